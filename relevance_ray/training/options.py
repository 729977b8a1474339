"""Options of training, light enough for the configuration to import (neither torch nor Ray)."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, Literal

from relevance_ray.options import STRICT, option
from relevance_ray.student.options import EncoderOptions
from relevance_ray.teacher.options import ClassifierOptions


@dataclass(frozen=True)
class FitOptions:
    """The optimisation loop. An example is a group for a student, a judged pair for a teacher."""

    __pydantic_config__ = STRICT
    epochs: int = option(1, "Passes over the examples")
    learning_rate: float = option(
        1e-4, "Peak learning rate; it rises linearly over the warmup, then falls linearly to 0"
    )
    warmup_ratio: float = option(0.06, "Share of the steps that warm up")
    weight_decay: float = option(0.01, "AdamW's weight decay, on matrices only")
    batch_size: int = option(8, "Examples of one global batch, over all workers together")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm")
    eval_every: int = option(
        0, "Steps between evaluations on the dev queries, the best of which is kept; 0: after each epoch"
    )
    patience: int = option(0, "End after so many evaluations without a better one; 0: never")
    seed: int = option(0, "Decides the order of the examples, dropout, and every fresh weight")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU (where bfloat16 is slower unless the CPU has it natively)"
    )
    max_batch_tokens: int = option(8192, "Tokens whose activations one worker holds at once", operational=True)
    checkpoint_every: int = option(100, "Steps between checkpoints to resume from", operational=True)
    sharded: bool = option(
        False, "Share the model out over the workers (FSDP), where none can hold it whole", operational=True
    )
    compiled: bool = option(
        False, "Train through torch.compile, which takes a minute to pay for itself", operational=True
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_batch_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} must be in [0, 1]")
        if self.weight_decay < 0 or self.eval_every < 0 or self.patience < 0 or self.seed < 0:
            raise ValueError("weight_decay, eval_every, patience and seed must not be negative")
        if self.patience and self.epochs == 1 and not self.eval_every:
            raise ValueError("patience never ends a run that is evaluated once; set eval_every")


@dataclass(frozen=True)
class HumanFitOptions(FitOptions):
    """The student on human labels alone: few judged queries, so several passes in small batches, the best on dev kept.
    A baseline that is left at a handful of steps would be a straw man."""

    __pydantic_config__ = STRICT
    epochs: int = option(3, "Passes over the judged queries")
    batch_size: int = option(4, "Queries of one global batch, over all workers together")


@dataclass(frozen=True)
class TeacherFitOptions(FitOptions):
    """A teacher sees a few thousand judged pairs several times."""

    __pydantic_config__ = STRICT
    epochs: int = option(3, "Passes over the judged pairs")
    batch_size: int = option(16, "Judged pairs of one global batch, over all workers together")
    learning_rate: float = option(5e-5, "Peak learning rate; with LoRA about ten times that of a full fine-tune")
    warmup_ratio: float = option(0.1, "Share of the steps that warm up")


CalibrationMethod = Literal["ordinal", "isotonic"]
_WEIGHTS = ("margin_weight", "level_weight", "bce_weight", "kl_weight", "infonce_weight")


@dataclass(frozen=True)
class StudentOptions(EncoderOptions):
    """The student and how it is distilled: a weighted sum of losses, over groups of the teacher's and of human labels."""

    __pydantic_config__ = STRICT
    kind: Literal["cross_encoder", "two_tower"] = option(
        "cross_encoder", "Query and product read together, or each to a vector of its own"
    )
    margin_weight: float = option(1.0, "Weight of the squared error of margins within a query")
    margins: Literal["all", "differing"] = option(
        "all", "Margins between all products of a query, or only between those of differing grade"
    )
    level_weight: float = option(
        0.05, "Weight of the mean difference to the teacher; 0 is the paper's form, margins alone"
    )
    bce_weight: float = option(0.0, "Weight of the binary cross-entropy on the sigmoid of the teacher's logit")
    kl_weight: float = option(0.0, "Weight of the KL divergence to the teacher's classes")
    kl_temperature: float = option(2.0, "Temperature of both sides of the KL divergence")
    infonce_weight: float = option(
        0.0, "Two-tower: weight of the contrast of a query's relevant products with all others of the batch"
    )
    infonce_temperature: float = option(0.05, "Temperature of that contrast")
    max_group_products: int = option(16, "Larger groups are cut, at random, into parts of at most this many products")
    human_share: float = option(
        0.0, "Share of the training groups that are human judgments, repeated as often as that takes"
    )
    human_order: Literal["mixed", "last"] = option("mixed", "Human judgments among the others, or after them")
    calibration: CalibrationMethod = option(
        "ordinal",
        "How its probabilities are fitted on dev: ordinal, a temperature and a threshold a grade; or isotonic, of no "
        "assumed shape, for 1,000 dev judgments and more",
        added_later=True,
    )
    fit: FitOptions = option(FitOptions(), "The loop")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _WEIGHTS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(f"one of {', '.join(_WEIGHTS)} must be above 0")
        for name in ("kl_temperature", "infonce_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        if self.infonce_weight and self.kind != "two_tower":
            raise ValueError("infonce_weight is read by kind two_tower only; leave it out")
        if self.fit.sharded:
            raise ValueError("fit.sharded is for teachers; a student fits every worker")
        if self.infonce_weight and self.dropout:
            raise ValueError("infonce_weight needs dropout 0, since it encodes each text twice")
        if self.max_group_products < 2:
            raise ValueError(
                f"max_group_products {self.max_group_products} must be at least 2: a margin needs two products"
            )
        if not 0.0 <= self.human_share < 1.0:
            raise ValueError(f"human_share {self.human_share} must be at least 0 and below 1")

    def on_human_labels(self, loss: str, fit: FitOptions) -> StudentOptions:
        """The same student on human judgments alone, by one loss (`margin_mse`, `soft_bce`)."""
        weights: dict[str, Any] = dict.fromkeys(_WEIGHTS, 0.0)
        if loss == "soft_bce":
            weights["bce_weight"] = 1.0
        else:
            weights |= {"margin_weight": 1.0, "level_weight": self.level_weight}
        return replace(self, **weights, human_share=0.0, fit=fit)


_OF_CLASSIFIERS = ("num_layers", "num_classes", "lora", "prompt", "dropout", "fit")


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@dataclass(frozen=True)
class TeacherMemberOptions(ClassifierOptions):
    """One member of an ensemble: trained (classifier), or used as it is (the others)."""

    __pydantic_config__ = STRICT
    kind: Literal["classifier", "bi_encoder", "query_likelihood", "bm25"] = option(
        "classifier",
        "classifier: trained on the judgments; bi_encoder: cosine of two texts; query_likelihood: how likely a causal "
        "language model finds the query, given the product; bm25: words",
    )
    fit: TeacherFitOptions = option(TeacherFitOptions(), "The loop, for a classifier")

    def __post_init__(self) -> None:
        super().__post_init__()
        unread: tuple[str, ...] = () if self.kind == "classifier" else _OF_CLASSIFIERS
        if self.kind in ("bm25", "ensemble"):
            unread = (*unread, "model", "max_tokens")
        if self.kind == "ensemble":
            unread = (*unread, "fields")
        for field in fields(self):
            if field.name in unread and getattr(self, field.name) != _default(field):
                raise ValueError(f"{field.name} is not read by kind {self.kind}; leave it out")


@dataclass(frozen=True)
class TeacherOptions(TeacherMemberOptions):
    """The teacher: one model, or an ensemble stacked on out-of-fold predictions."""

    __pydantic_config__ = STRICT
    kind: Literal["classifier", "bi_encoder", "query_likelihood", "ensemble"] = option(  # type: ignore[assignment]
        "classifier",
        "A trained classifier; a bi-encoder or a query likelihood model, which are only calibrated; or an ensemble of "
        "`members`",
    )
    members: list[TeacherMemberOptions] = option([], "Members of an ensemble")
    folds: int = option(2, "Folds of the train queries for a trained member's out-of-fold predictions")
    stack_l2: float = option(0.01, "Ridge of the stacking regression")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise ValueError(f"folds {self.folds} must be at least 2")
        if self.stack_l2 < 0:
            raise ValueError(f"stack_l2 {self.stack_l2} must not be negative")
        if self.kind != "ensemble":
            for name in ("folds", "stack_l2"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} is read by kind ensemble only; leave it out")
        if (self.kind == "ensemble") != bool(self.members):
            raise ValueError("`members` belongs to kind ensemble, which needs at least one")
