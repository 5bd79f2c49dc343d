"""How good a candidate's model is: short training on real text, and evaluation on text held out of it.

`corpus.py` finds the text, `recall.py` makes the associative-recall task, `train.py` trains an architecture once,
`serve.py` prunes, recovers and packs it as a candidate's sparsity and formats say, `evaluate.py` scores that.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cosearch.core import check
from cosearch.core.errors import UserError
from cosearch.core.registry import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """How a model is trained and evaluated; the same rows, in the same order, for every candidate.

    A batch is `text_rows` of the corpus and `recall_rows` of the recall task, each `length` bytes.
    `matrix_rate` is Muon's learning rate for the layers' matrices, `vector_rate` Adam's for all else.
    What was pruned, or is stored in fewer than 8 bits, is trained for `recovery_steps` more, at `recovery_rate` times
    these rates; `distillation` is the part of that loss which compares with the unpruned model, the rest is the text's.
    At 1 it learns nothing that its parent had not learnt, and compares fairly with models that need no recovery.
    """

    steps: int = 160
    recovery_steps: int = 0
    recovery_rate: float = 0.2
    distillation: float = 1.0
    length: int = 256
    text_rows: int = 4
    recall_rows: int = 2
    matrix_rate: float = 0.05
    vector_rate: float = 0.008
    warmup_steps: int = 10
    evaluated_windows: int = 64
    evaluated_recalls: int = 16
    seed: int = 0

    @property
    def unrecovered(self) -> "Recipe":
        """The same without recovery: what a training from random weights depends on."""
        return replace(self, recovery_steps=0, recovery_rate=Recipe.recovery_rate, distillation=Recipe.distillation)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "quality") -> "Recipe":
        """Read plain data.

        Raises:
            UserError: a key is unknown, or a value is of the wrong type or out of range.
        """
        known = {field.name: field for field in fields(cls)}
        for key, value in data.items():
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), tuple(known))}")
            at = f"{where}.{key}"
            if isinstance(known[key].default, int):
                check.whole(value, 0 if key in ("seed", "recall_rows", "recovery_steps") else 1, at)
            elif key == "distillation":
                check.share(value, at)
            else:
                check.positive(value, at)
        recipe = cls(**data)
        for key in ("steps", "recovery_steps"):
            if (steps := getattr(recipe, key)) % 10:
                raise UserError(f"{where}.{key}: {steps} is not a multiple of 10, which are compiled as one")
        if recipe.warmup_steps >= recipe.steps:
            raise UserError(f"{where}.warmup_steps: {recipe.warmup_steps} is not below the {recipe.steps} steps")
        if recipe.length < 256:
            raise UserError(f"{where}.length: a recall row needs at least 256 bytes, not {recipe.length}")
        return recipe
