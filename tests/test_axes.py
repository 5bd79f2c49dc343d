"""The rules of the four axes together, and that every search space and experiment of the project is in order."""

import random

import pytest

from cosearch import axes
from cosearch.__main__ import compose
from cosearch.architecture.decoder import params_spec
from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import UserError
from cosearch.core.space import Space
from cosearch.paths import CONF, SEARCH_SPACES
from cosearch.settings import Settings
from cosearch.targets import TARGETS
from cosearch.testing import small_space

SPACES = sorted(path.stem for path in SEARCH_SPACES.glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def space() -> Space:
    return small_space({"architecture.width": [64], "architecture.head_dim": [16], "architecture.depth": [2]})


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (
            {"architecture.attention": ("mha", "mqa"), "schedule.layers": "scan"},
            ["rule 'scan needs equal layers'", "schedule.layers='scan'", "'unroll'"],
        ),
        ({"architecture.head_dim": 24}, ["rule 'architecture fits'", "heads of 24", "width of 64"]),
        (
            {"architecture.attention": "gqa", "architecture.kv_heads": 3},
            ["rule 'architecture fits'", "4 query heads cannot share 3 key/value heads"],
        ),
        (
            {"sparsity.pattern": "structured", "sparsity.heads_kept": 1.0, "sparsity.channels_kept": 1.0},
            ["rule 'sparsity fits'", "heads_kept, channels_kept and layers_kept"],
        ),
        (
            {"architecture.attention": "gated_delta", "schedule.attention": "cpp"},
            [
                "rule 'kernels run something'",
                "schedule.attention='cpp' runs no layer's attention",
                "no layer has softmax",
            ],
        ),
        (
            {"schedule.fusion": "layer"},
            ["rule 'kernels run something'", "schedule.fusion='layer'", "only products by the kernel 'cpp'"],
        ),
        (
            {"schedule.matmul": "cpp", "schedule.fusion": "step"},
            ["rule 'kernels run something'", "schedule.fusion='step'", "take layers='unroll'"],
        ),
        (
            {
                "architecture.attention": ("mha", "mla"),
                "architecture.latent": 32,
                "schedule.layers": "unroll",
                "schedule.matmul": "cpp",
                "schedule.fusion": "step",
            },
            ["rule 'kernels run something'", "layer 1 is not run as one call", "no softmax attention"],
        ),
    ],
)
def test_a_rule_says_what_is_wrong(space: Space, choices: dict[str, Value], words: list[str]):
    defaults = {name: knob.default for name, knob in axes.declared_knobs().items()}
    point = space.canonical({**defaults, "architecture.width": 64, "architecture.head_dim": 16, **choices})
    why = space.why_invalid(point)
    assert why is not None
    assert all(word in why for word in words), why


def test_a_kernel_is_for_its_kind_of_device(space: Space):
    candidate = Candidate.from_point({**space.reference.point, "schedule.matmul": "cpp"})
    assert TARGETS["h100"].why_not(candidate) == "the kernel 'cpp' is for cpu"
    assert TARGETS["h100"].why_not(space.reference) is None


def test_a_compiler_option_is_for_its_kind_of_device(space: Space):
    options = ("xla_cpu_enable_fast_math=true", "xla_llvm_disable_expensive_passes=true")
    candidate = Candidate.from_point({**space.reference.point, "schedule.compiler_options": options})
    assert TARGETS["h100"].why_not(candidate) == "the compiler option 'xla_cpu_enable_fast_math' is for cpu"
    assert TARGETS["cpu"].why_not(candidate) is None
    assert TARGETS["h100"].why_no_value("schedule.compiler_options", options[1:]) is None
    assert TARGETS["tpu_v5e"].why_no_value("schedule.compiler_options", options[1:]) is not None


@pytest.mark.parametrize("name", ["llm_decode", "llm_decode_full"])
@pytest.mark.parametrize("target", TARGETS.names())
def test_one_file_holds_the_space_of_every_target(name: str, target: str):
    """What a target does not run is not in it, and its points are as easily found as those of others."""
    space = axes.load_space(name, target=target)
    chip = TARGETS[target]
    for knob, values in space.knobs.items():
        assert not [value for value in values if chip.why_no_value(knob, value)]
    rng = random.Random(0)
    drawn = [space.canonical(space.draw(rng)) for _ in range(300)]
    refused = [broken[0] for point in drawn if (broken := space.broken_rule(point))]
    assert f"{target} runs it" not in refused
    assert len(refused) < 0.95 * len(drawn)
    assert (len(space.knobs["schedule.boundary"]) > 1) == target.startswith("tpu")


def test_a_target_with_no_value_left_says_why():
    with pytest.raises(UserError, match=r"target=h100 allows none of 'cpp'\. the kernel 'cpp' is for cpu"):
        axes.load_space("llm_decode", {"schedule.matmul": ["cpp"]}, target="h100")


def test_portable_models_keep_the_arrays_and_name_no_kernel(space: Space):
    native = {"schedule.matmul": "cpp", "schedule.attention": "cpp", "schedule.cache_layout": "bhds"}
    candidate = Candidate.from_point({**space.reference.point, **native, "schedule.fusion": "layer"})
    own, portable = axes.decoder(candidate), axes.portable_decoder(candidate)
    assert portable.schedule.fusion == "none"
    assert {portable.schedule.matmul, portable.schedule.attention} == {"dot"}
    assert portable.schedule.cache_layout == "bhds"
    assert params_spec(own) == params_spec(portable)
    assert own.cache_spec(2, 8) == portable.cache_spec(2, 8)


def test_layers_that_differ_are_legal_where_each_runs_on_its_own(space: Space):
    point = space.reference.point | {"architecture.attention": ("mha", "mqa"), "schedule.layers": "unroll"}
    assert space.why_invalid(point) is None


@pytest.mark.parametrize(("attention", "layers"), [("mqa", "scan"), (("mha", "mqa"), "unroll")])
def test_the_plain_form_keeps_the_architecture_and_nothing_else(space: Space, attention: Value, layers: str):
    choices = {"architecture.attention": attention, "precision.weights": "int8", "schedule.layers": "unroll"}
    candidate = Candidate.from_point({**space.reference.point, **choices, "schedule.matmul": "multiply_reduce"})
    plain = axes.plain(candidate)
    assert plain.architecture == candidate.architecture
    assert (plain.precision["weights"], plain.sparsity["pattern"]) == ("float32", "dense")
    assert (plain.schedule["matmul"], plain.schedule["layers"]) == ("dot", layers)
    assert space.why_invalid(plain.point) is None
    assert axes.plain(plain) == plain


@pytest.mark.parametrize("name", SPACES)
def test_every_search_space_loads_and_its_reference_is_legal(name: str):
    loaded = axes.load_space(name)
    assert loaded.canonical(loaded.reference.point) == loaded.reference.point
    assert loaded.why_invalid(loaded.reference.point) is None
    assert axes.decoder(loaded.reference).shape.parameters > 0
    assert set(loaded.knobs) == set(axes.declared_knobs())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_into_valid_settings(name: str):
    settings = Settings.from_config(compose([f"experiment={name}"]))
    assert settings.experiment == name
    space = axes.load_space(settings.space, settings.knobs)
    assert space.reference.uid


def test_there_are_spaces_and_experiments():
    assert SPACES
    assert EXPERIMENTS
