import numpy as np
import pandas
import pytest

from cosearch.core.errors import UserError
from cosearch.latency import tables
from cosearch.latency.tables import GPUChip, describe, read
from tests.latency.tables import SYSTEMS, write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def test_the_newest_version_is_read_without_rows_measured_with_the_power(folder) -> None:
    measured = {one.chip.name: one for one in read([folder], "gemm")}
    assert measured.keys() == SYSTEMS.keys()
    assert {one.version for one in measured.values()} == {"1.10.0"}, "newer than 1.9.0, as a version"
    assert all(len(one.latency_s) == len(one.operations) == 300 for one in measured.values())


def test_the_generation_tells_multiprocessors_and_caches() -> None:
    chip = GPUChip.of_specification("h100", 3.35e12, {"bfloat16": 989e12, "fp8": 1979e12}, 9.0)
    assert chip.generation == "Hopper"
    assert chip.multiprocessors == pytest.approx(132, rel=0.01)
    assert chip.l2_bytes == pytest.approx(50 * 2**20, rel=0.01)


def test_descriptions_are_ratios(folder) -> None:
    """A chip that is twice as fast in everything has the same shares where nothing is but memory and arithmetic."""
    one = read([folder], "gemm")[0]
    description = describe(one.operations, one.chip)
    assert np.isfinite(description.features).all()
    np.testing.assert_allclose(description.shares.sum(axis=1), 1.0)
    assert (description.roofline_s > 0).all()


def changed(name: str, **values):
    """Columns of a file with another value in each row."""

    def change(folder) -> None:
        if name.endswith("csv"):
            pandas.read_csv(folder / name).assign(**values).to_csv(folder / name, index=False)
        else:
            pandas.read_parquet(folder / name).assign(**values).to_parquet(folder / name)

    return change


def without(name: str, column: str):
    """A file without a column."""

    def change(folder) -> None:
        if name.endswith("csv"):
            pandas.read_csv(folder / name).drop(columns=column).to_csv(folder / name, index=False)
        else:
            pandas.read_parquet(folder / name).drop(columns=column).to_parquet(folder / name)

    return change


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "systems.csv").unlink(), "systems.csv: is missing"),
        (lambda folder: (folder / "gemm_made.parquet").unlink(), "has no table gemm_"),
        (lambda folder: (folder / "gemm_made.parquet").write_bytes(b"no table"), "is no table in Parquet"),
        (
            lambda folder: pandas.DataFrame({"gemm_dtype": ["fp8"]}).to_parquet(folder / "gemm_made.parquet"),
            "'system' is missing. There are: gemm_dtype",
        ),
        (
            lambda folder: pandas.read_csv(folder / "systems.csv").iloc[1:].to_csv(folder / "systems.csv", index=False),
            "systems.csv: the system 'old' is missing. There are: new",
        ),
        (without("gemm_made.parquet", "latency_ms"), "gemm_made.parquet: the column 'latency_ms' is missing"),
        (without("gemm_made.parquet", "version"), "the column 'version' is missing"),
        (without("gemm_made.parquet", "m"), "the column 'm' is missing"),
        (changed("gemm_made.parquet", latency_ms="fast"), "'latency_ms' has 'fast'; allowed are numbers"),
        (changed("gemm_made.parquet", k="wide"), "'k' has 'wide'; allowed are numbers"),
        (changed("gemm_made.parquet", latency_ms=np.nan), "no row that could be learnt from"),
        (changed("gemm_made.parquet", gemm_dtype="int8"), "no row that could be learnt from"),
        (lambda folder: (folder / "systems.csv").write_text(""), "systems.csv: is no table in CSV"),
        (without("systems.csv", "gpu.mem_bw"), "systems.csv: the column 'gpu.mem_bw' is missing"),
        (changed("systems.csv", **{"gpu.mem_bw": "2 TB/s"}), "'gpu.mem_bw' has '2 TB/s'; allowed are numbers"),
        (changed("systems.csv", **{"gpu.mem_bw": None}), "gpu.mem_bw of '.*' is nan; allowed are positive"),
        (changed("systems.csv", **{"gpu.sm_version": 70}), "compute capability 7; known are 8.0 and later"),
    ],
)
def test_wrong_tables_are_refused_by_name(folder, break_it, says: str) -> None:
    break_it(folder)
    with pytest.raises(UserError, match=says):
        read([folder], "gemm")


def test_what_no_table_was_measured_on_need_not_be_specified(folder) -> None:
    sheet = pandas.read_csv(folder / "systems.csv")
    other = pandas.DataFrame({"system": ["v100", "b60"], "gpu.sm_version": [70, None], "gpu.mem_bw": [None, 456e9]})
    pandas.concat([sheet, other]).to_csv(folder / "systems.csv", index=False)
    assert {one.chip.name for one in read([folder], "gemm")} == SYSTEMS.keys()


def test_a_chip_of_another_maker_is_of_no_generation(folder) -> None:
    changed("systems.csv", **{"gpu.sm_version": None})(folder)
    [generation] = {one.chip.generation for one in read([folder], "gemm")}
    assert generation == "of no compute capability"


def test_rows_without_sizes_are_left_out(folder) -> None:
    table = pandas.read_parquet(folder / "gemm_made.parquet")
    table.loc[table.index % 2 == 0, "n"] = 0
    table["k"] = table.k.astype("Int32").mask(table.index % 3 == 0)
    table.to_parquet(folder / "gemm_made.parquet")
    for one in read([folder], "gemm"):
        assert len(one.latency_s) == 100
        assert np.isfinite(describe(one.operations, one.chip).features).all()


def test_unknown_kinds_are_refused(folder) -> None:
    with pytest.raises(UserError, match=r"unknown kind of operation 'gem'.*gemm"):
        read([folder], "gem")


def test_every_kind_is_described_for_a_chip() -> None:
    chip = GPUChip.of_specification("h100", 3.35e12, {"bfloat16": 989e12, "fp8": 1979e12}, 9.0)
    sizes = {"m": [1, 64], "n": [128, 256], "k": [64, 512], "batch": [1, 8], "tokens": [16, 4096]}
    sizes |= {"heads": [8, 32], "kv_heads": [8, 4], "head_dim": [64, 128]}
    for name, kind in tables.KINDS.items():
        columns = {column: np.array(sizes.get(column, ["bfloat16", "fp8"])) for column in kind.columns}
        description = describe(tables.Operations(name, columns), chip)
        assert np.isfinite(description.features).all(), name
        assert description.features.shape[0] == len(description.roofline_s) == 2
