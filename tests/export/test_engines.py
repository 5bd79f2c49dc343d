"""What each serving stack loads of a space, and why not the rest."""

import random
from pathlib import Path

import pytest

from cosearch import axes
from cosearch.core.candidate import Candidate, Value
from cosearch.core.errors import UserError
from cosearch.core.space import Space
from cosearch.export import ENGINES
from cosearch.proposers import PROPOSERS, Setting
from cosearch.testing import small_problem, small_space
from tests.test_third_party import install, python

STACKS = ("llama_cpp", "sglang", "vllm")


@pytest.fixture(scope="module")
def space() -> Space:
    """One that refuses only what no axis can do."""
    return small_space({"architecture.width": [128], "architecture.depth": [3]})


def chosen(space: Space, choices: dict[str, Value]) -> Candidate:
    """The reference with some knobs set; it must be legal where nothing is deployed."""
    defaults = {name: knob.default for name, knob in axes.declared_knobs().items()}
    point = space.canonical({**defaults, **space.reference.point, **choices})
    assert space.why_invalid(point) is None
    return Candidate.from_point(point)


def test_these_stacks_are_there():
    assert ENGINES.names() == STACKS


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("space_name", ["llm_decode", "llm_decode_full"])
def test_every_stack_loads_the_reference(name: str, space_name: str):
    assert ENGINES[name].why_not(axes.load_space(space_name).reference) is None


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"architecture.attention": "mqa", "architecture.qk_norm": False},
        {"architecture.attention": "gqa", "architecture.kv_heads": 2, "architecture.ffn_ratio": 2},
        {"precision.weights": "bfloat16", "precision.kv_cache": "bfloat16", "precision.activations": "bfloat16"},
        {"precision.weights": "int4_g32", "precision.rules": ("embedding=bfloat16",)},
        {"precision.weights": "bfloat16", "precision.rules": ("*.output=int4_g64",)},
        {"precision.rules": ("layers.0.*=bfloat16",), "schedule.layers": "unroll"},
        {"precision.kv_cache": ("bfloat16", "bfloat16")},
        {"sparsity.pattern": "structured", "sparsity.heads_kept": 0.5, "sparsity.layers_kept": 1.0},
    ],
    ids=str,
)
def test_every_stack_loads_llama_like_models(space: Space, name: str, choices: dict[str, Value]):
    assert ENGINES[name].why_not(chosen(space, choices)) is None


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    ("choices", "why"),
    [
        (
            {"architecture.attention": ("mha", "mqa"), "schedule.layers": "unroll"},
            "its layers differ, which a Llama-like config cannot tell",
        ),
        (
            {"architecture.ffn_ratio": (2, 4), "schedule.layers": "unroll"},
            "its layers differ, which a Llama-like config cannot tell",
        ),
        (
            {"architecture.attention": ("mqa", "cross_layer"), "schedule.layers": "unroll"},
            "its layers differ, which a Llama-like config cannot tell",
        ),
        (
            {"architecture.attention": "local_global", "schedule.layers": "unroll"},
            "its layers differ, which a Llama-like config cannot tell",
        ),
        (
            {"architecture.attention": "mla"},
            "attention 'mla' is of no Llama-like family; mha, gqa and mqa are",
        ),
        (
            {"architecture.attention": "gated_delta"},
            "attention 'gated_delta' is of no Llama-like family; mha, gqa and mqa are",
        ),
        (
            {"architecture.attention": "sliding_window"},
            "attention 'sliding_window' is of no Llama-like family; mha, gqa and mqa are",
        ),
        (
            {"architecture.feedforward": "gelu"},
            "feed-forward 'gelu' is of no Llama-like family; swiglu is",
        ),
        (
            {"architecture.feedforward": "moe"},
            "feed-forward 'moe' is of no Llama-like family; swiglu is",
        ),
        (
            {"architecture.feedforward": "none"},
            "feed-forward 'none' is of no Llama-like family; swiglu is",
        ),
        (
            {"sparsity.attention": "block_topk"},
            "no stack skips blocks of keys as 'block_topk' does",
        ),
        (
            {"sparsity.pattern": "n_m"},
            "no stack runs weights of the pattern 'n_m'; it would be served dense",
        ),
        (
            {"sparsity.pattern": "block"},
            "no stack runs weights of the pattern 'block'; it would be served dense",
        ),
        (
            {"precision.rules": ("layers.*.value=bfloat16",)},
            "query, key, value are multiplied by as one and must share a format, not ['bfloat16', 'float32']",
        ),
        (
            {"precision.rules": ("layers.2.*.up=bfloat16",), "schedule.layers": "unroll"},
            "gate, up are multiplied by as one and must share a format, not ['bfloat16', 'float32']",
        ),
        (
            {"precision.kv_cache": ("bfloat16", "float32"), "schedule.layers": "unroll"},
            "the cache is of one format in all layers",
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_no_stack_loads_what_a_llama_like_config_cannot_tell(
    space: Space, name: str, choices: dict[str, Value], why: str
):
    assert ENGINES[name].why_not(chosen(space, choices)) == why


_WHOLE_EMBEDDING = {"precision.rules": ("embedding=bfloat16",)}
_INT8 = {"precision.weights": "int8"} | _WHOLE_EMBEDDING
_INT8_BY_INT8 = _INT8 | {"precision.matmul_inputs": "int8"}
_FLOAT8 = {"precision.weights": "float8_e4m3"} | _WHOLE_EMBEDDING
_FLOAT8_BY_FLOAT8 = _FLOAT8 | {"precision.matmul_inputs": "float8_e4m3"}
_INT4_BY_INT8 = {"precision.weights": "int4_g32", "precision.matmul_inputs": "int8"} | _WHOLE_EMBEDDING
_ALL, _HUGGING_FACE = frozenset(STACKS), frozenset({"sglang", "vllm"})


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    ("choices", "loaded_by"),
    [
        (_INT8, {"llama_cpp", "vllm"}),
        (_INT8_BY_INT8, _HUGGING_FACE),
        (_FLOAT8, _HUGGING_FACE),
        (_FLOAT8_BY_FLOAT8, _HUGGING_FACE),
        ({"precision.weights": "int4_g128"} | _WHOLE_EMBEDDING, _ALL),
        (_INT4_BY_INT8, frozenset()),
        ({"precision.weights": "nvfp4"} | _WHOLE_EMBEDDING, {"vllm"}),
        ({"precision.weights": "mxfp4"} | _WHOLE_EMBEDDING, {"llama_cpp"}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_weights_and_inputs_are_loaded_as_pairs(
    space: Space, name: str, choices: dict[str, Value], loaded_by: set[str]
):
    candidate = chosen(space, choices)
    why = ENGINES[name].why_not(candidate)
    assert (why is None) is (name in loaded_by), why
    if why is not None:
        weights = choices["precision.weights"]
        inputs = choices.get("precision.matmul_inputs", "as_is")
        assert why.startswith(f"weights in {weights} by inputs {inputs} are not among what it loads: bfloat16 by as_is")


@pytest.mark.parametrize("weights", ["int8", "float8_e4m3", "int4_g128"])
def test_hugging_face_embeddings_are_not_quantised(space: Space, weights: str):
    for name in _HUGGING_FACE:
        why = ENGINES[name].why_not(
            chosen(space, {"precision.weights": "bfloat16", "precision.rules": (f"embedding={weights}",)})
        )
        assert why == f"an embedding in {weights} is not loaded; bfloat16, float32 are"


def test_gguf_stores_rows_in_blocks_of_32():
    space = small_space({"architecture.width": [48], "architecture.depth": [2], "architecture.head_dim": [16]})
    why = ENGINES["llama_cpp"].why_not(chosen(space, {"precision.weights": "int8"}))
    assert why == "layers.0.attention.query: blocks of 32 do not divide 48 rows"


@pytest.mark.parametrize("name", STACKS)
def test_values_that_a_stack_never_loads_are_left_out(name: str):
    space = axes.load_space("llm_decode_full", target="cpu", deploy=name)
    assert space.knobs["architecture.attention"] == ("mha", "gqa", "mqa")
    assert space.knobs["sparsity.pattern"] == ("dense", "structured")
    assert ("float8_e4m3" in space.knobs["precision.weights"]) is (name != "llama_cpp")
    with pytest.raises(UserError) as caught:
        axes.load_space("llm_decode_full", {"architecture.attention": ["mla"]}, target="cpu", deploy=name)
    assert str(caught.value).endswith(
        f"knobs.architecture.attention: deploy={name} allows none of 'mla'. Allowed: gqa, mha, mqa"
    )


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("proposer", ["random", "nevergrad"])
def test_a_search_for_a_stack_has_enough_to_propose(name: str, proposer: str):
    space = axes.load_space("llm_decode_full", target="cpu", deploy=name)
    found = PROPOSERS[proposer](Setting(space, small_problem(), 0, {})).ask(20)
    assert len(found) == 20 and all(ENGINES[name].why_not(candidate) is None for candidate in found)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    ("cache", "loaded_by"),
    [
        ("float32", _ALL),
        ("bfloat16", _ALL),
        ("float8_e4m3", _HUGGING_FACE),
        ("int8", {"llama_cpp"}),
        ("int4", {"llama_cpp"}),
    ],
)
def test_a_cache_is_in_a_format_that_the_stack_has(space: Space, name: str, cache: str, loaded_by: set[str]):
    why = ENGINES[name].why_not(chosen(space, {"precision.kv_cache": cache}))
    assert (why is None) is (name in loaded_by), why
    assert why is None or why.startswith(f"a cache in {cache} is not among what it has: bfloat16, float32"), why


@pytest.mark.parametrize("name", STACKS)
def test_a_space_to_be_deployed_holds_only_what_is_loaded(name: str):
    space = axes.load_space("llm_decode_full", target="cpu", deploy=name)
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(30)]
    assert len({candidate.uid for candidate in drawn}) == 30
    for candidate in (space.reference, *drawn):
        assert ENGINES[name].why_not(candidate) is None
        assert space.why_invalid(candidate.point) is None
        assert candidate.architecture["feedforward"] == "swiglu"
        assert candidate.architecture["attention"] in ("mha", "gqa", "mqa")
        assert candidate.sparsity["pattern"] in ("dense", "structured")
        assert axes.served_shape(candidate).uniform
    refused = space.reference.point | {"architecture.attention": "mla", "architecture.latent": 32}
    assert str(space.why_invalid(refused)).startswith(f"rule '{name} loads it': attention 'mla' is of no Llama-like")


def test_a_stack_that_names_an_unknown_knob_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(ENGINES["vllm"]), "loads", {"architecture.atention": frozenset({"mha"})})
    with pytest.raises(UserError) as caught:
        axes.load_space("llm_decode", deploy="vllm")
    assert str(caught.value).startswith(
        "deploy=vllm: unknown knob 'architecture.atention'; did you mean 'architecture.attention'? Allowed: "
    )


def test_an_unknown_stack_is_refused():
    with pytest.raises(
        UserError, match=r"unknown engine 'vlm'; did you mean 'vllm'\? Allowed: llama_cpp, sglang, vllm"
    ):
        axes.load_space("llm_decode", deploy="vlm")


ENGINE = '''
"""Loads one layer only."""
from cosearch.export import ENGINES


class OneLayer:
    loads = {}

    def why_not(self, candidate):
        return None if candidate.architecture["depth"] == 1 else "it has room for one layer"


ENGINES.register("one_layer")(OneLayer())
'''

SPACE = """
knobs: {architecture.depth: [1, 2, 3], architecture.width: [32, 64]}
reference: {architecture.depth: 1}
"""

USE = """
import random, sys
from cosearch import axes
from cosearch.__main__ import compose
from cosearch.export import ENGINES
from cosearch.settings import Settings

assert ENGINES.names() == ("llama_cpp", "one_layer", "sglang", "vllm"), ENGINES.names()
config = compose(["experiment=llm_decode", "proposer=random", "deploy=one_layer", f"space={sys.argv[1]}"])
space = Settings.from_config(config).load_space()
rng = random.Random(0)
assert {space.sample(rng).architecture["depth"] for _ in range(20)} == {1}
print(space.why_invalid(space.reference.point | {"architecture.depth": 2}))
"""


def test_a_stack_of_another_package_is_deployed_to_by_name(tmp_path: Path):
    install(tmp_path / "site", {"one_layer": ENGINE}, "[cosearch.engine]\none_layer = acme_cosearch.one_layer\n")
    (tmp_path / "theirs.yaml").write_text(SPACE)
    result = python(tmp_path / "site", USE, str(tmp_path / "theirs.yaml"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "rule 'one_layer loads it': it has room for one layer\n"
