"""Operation models as files: the ones that ship, and those that somebody trained on tables of their own.

A folder has `operations_gpu.safetensors`, the networks' weights, and `operations_gpu.json`, all else: the learnt
priors, what was trained on, and the error card, how wrong the models are on chips of families that were left out. What
ships was written by `python -m cosearch import_tables path=DIR output=cosearch/latency/pretrained`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as deserialize
from safetensors.numpy import save as serialize

from cosearch.core.errors import UserError
from cosearch.core.files import as_json, write_files
from cosearch.latency import SHIPPED, tables
from cosearch.latency.error_card import leave_out, refuse_few
from cosearch.latency.table_model import VERSION, Network, OperationModel, Training
from cosearch.latency.transfer import Prior
from cosearch.paths import cache_dir

SHOTS = (0, 10, 50)
_WEIGHTS, _CARD = "operations_gpu.safetensors", "operations_gpu.json"
_SEEDS = 2


@dataclass(frozen=True)
class Pretrained:
    """Operation models by kind, and their `card`: what they learnt from and how wrong they are."""

    models: Mapping[str, OperationModel]
    card: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The version, and the fingerprints of the tables that were learnt from."""
        return f"operations {VERSION}, " + ", ".join(f"{kind} {one.fingerprint}" for kind, one in self.models.items())


def train(folders: Sequence[Path], progress: Callable[[str, float], None]) -> Pretrained:
    """Learn from every kind of table in `folders`; the error card leaves out one generation of GPUs after the other.

    Raises:
        UserError: there is no table, or one is wrong.
    """
    kinds = [kind for kind in tables.KINDS if any(any(one.glob(f"{kind}_*.parquet")) for one in folders)]
    if not kinds:
        raise UserError(
            f"path={','.join(map(str, folders))}: has no tables. Allowed are files named "
            f"{', '.join(f'{kind}_<framework>.parquet' for kind in tables.KINDS)}"
        )
    models, card = {}, {}
    for index, kind in enumerate(kinds):

        def tell(what: str, part: float, kind: str = kind, index: int = index) -> None:
            progress(f"{kind}: {what}", (index + part) / len(kinds))

        tell("reading", 0.0)
        measured = tables.read([one for one in folders if any(one.glob(f"{kind}_*.parquet"))], kind)
        families = {one.chip.name: one.chip.generation for one in measured}
        if len(set(families.values())) < 2:
            raise UserError(
                f"path={','.join(map(str, folders))}: the tables of {kind} are of one generation of GPUs, "
                f"{', '.join(sorted(set(families.values())))}; how chips differ is learnt from at least two"
            )
        for one in measured:
            refuse_few(one, SHOTS)
        training = Training(measured, families, [count for count in SHOTS if count])
        scores = []
        for place, one in enumerate(measured):
            tell(f"without {one.chip.generation}, for {one.chip.name}", place / (len(measured) + 1))
            scores += leave_out(training, one, SHOTS, _SEEDS)
        tell("on all", len(measured) / (len(measured) + 1))
        models[kind] = training.model()
        card[kind] = {
            "systems": {one.chip.name: {"version": one.version, "rows": len(one.latency_s)} for one in measured},
            "errors on generations left out": scores,
        }
    return Pretrained(models, card)


def save(pretrained: Pretrained, folder: Path) -> None:
    """Write the files of a folder: those of before are replaced once both are written."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {}
    for kind, model in pretrained.models.items():
        arrays |= {f"{kind}.bounds": model.network.bounds, f"{kind}.standard": model.network.standard}
        for index, member in enumerate(model.network.members):
            arrays |= {f"{kind}.{index}.{place}": leaf for place, leaf in enumerate(member)}
        prior = model.prior
        told[kind] = {
            "fingerprint": model.fingerprint,
            "prior": {
                "amplitudes": dict(prior.amplitudes),
                "weights": list(prior.weights),
                "stretch": {str(count): factor for count, factor in prior.stretch.items()},
            },
            **pretrained.card[kind],
        }
    weights = serialize({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    card = {"version": VERSION, "weights": _fingerprint(weights), "kinds": told}
    write_files({folder / _WEIGHTS: weights, folder / _CARD: as_json(card).encode()})


def trained() -> Path:
    """Where `import_tables` puts models unless it is told otherwise."""
    return cache_dir() / "models"


def load(folder: Path | None = None) -> Pretrained:
    """The models in `folder`; by default those that were trained here, or else the ones that ship.

    Raises:
        UserError: there are none, they are damaged, or of another version.
    """
    if folder is None:
        folder = trained() if (trained() / _CARD).is_file() else SHIPPED
    try:
        told = json.loads((folder / _CARD).read_text())
        if told["version"] != VERSION:
            raise UserError(
                f"{folder / _CARD}: version {told['version']!r}; this cosearch reads version {VERSION}. Train anew by "
                "python -m cosearch import_tables path=DIR"
            )
        weights = (folder / _WEIGHTS).read_bytes()
        if told["weights"] != _fingerprint(weights):
            raise ValueError(f"{_WEIGHTS} is not the one that {_CARD} tells of")
        arrays = deserialize(weights)
        models = {kind: _model(kind, one, arrays) for kind, one in told["kinds"].items()}
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: has no models of operations, or they are damaged: {error}") from None
    return Pretrained(models, told["kinds"])


def _fingerprint(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()[:16]


def _model(kind: str, told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> OperationModel:
    members: dict[int, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        own, _, rest = name.partition(".")
        index, found, place = rest.partition(".")
        if own == kind and found:
            members.setdefault(int(index), {})[int(place)] = array
    leaves = [tuple(one[place] for place in sorted(one)) for _, one in sorted(members.items())]
    network = Network(tuple(leaves), arrays[f"{kind}.bounds"], arrays[f"{kind}.standard"])
    prior = told["prior"]
    stretch = {int(count): factor for count, factor in prior["stretch"].items()}
    return OperationModel(
        kind, network, Prior(prior["amplitudes"], tuple(prior["weights"]), stretch), told["fingerprint"]
    )
