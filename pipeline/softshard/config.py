"""The settings of a job: what a run reads, computes and trains, frozen and checked one by one and against each other.

The core takes plain typed values from here. `softshard.jobfile` reads them from a file and names what is wrong there.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from softshard.sketches import (
    FullSketch,
    NucleusSketch,
    Settings,
    SketchSettings,
    ThresholdSketch,
    TopkSketch,
)
from softshard.storage.location import problem_of_uri

__all__ = [
    "AdaptiveSettings",
    "BaselineSettings",
    "ClusterSettings",
    "CorpusSettings",
    "DataType",
    "EvaluateSettings",
    "FullSketch",
    "Job",
    "LoraSettings",
    "NucleusSketch",
    "OptimizerSettings",
    "RetentionSettings",
    "SketchSettings",
    "SourceSettings",
    "TeacherSettings",
    "ThresholdSketch",
    "TopkSketch",
    "TrainSettings",
    "VllmSettings",
    "digest_of",
]

DataType = Literal["auto", "float32", "bfloat16"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]


class SourceSettings(Settings):
    """One source of documents. A source without a licence and a rights basis is refused."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the source, a value to filter and join by."""
    uri: str = Field(min_length=1)
    """File, folder, glob or fsspec URI; with `format: datasets`, a data set's name or local folder."""
    format: Literal["auto", "text", "jsonl", "parquet", "datasets"] = "auto"
    """`auto` goes by the ending: .txt .text .md .markdown are text, .jsonl .ndjson JSON Lines, .parquet Parquet;
    `.zst` and `.gz` may follow any of them."""
    style: str = Field(min_length=1)
    """Style of the writing, for example academic, conversational, literary, technical."""
    license: str
    """SPDX licence expression, for example CC0-1.0, MIT, CC-BY-4.0, LicenseRef-Owned."""
    rights_basis: Literal["public-domain", "owned", "licensed", "consented"]
    """By what right the text is used."""
    text_field: str = "text"
    """Field or column that holds the text (JSON Lines, Parquet, datasets)."""
    group_field: str | None = None
    """Field or column that names the author or any other group; without it the group is the source's name."""
    split: str = "train"
    """Split to read (`format: datasets` alone)."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents, the first ones."""

    @field_validator("uri")
    @classmethod
    def _without_credential(cls, value: str) -> str:
        return _plain_uri(value)

    @field_validator("license")
    @classmethod
    def _spdx(cls, value: str) -> str:
        from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

        try:
            return str(canonicalize_license_expression(value))
        except InvalidLicenseExpression as error:
            problem = f"{value!r} is not an SPDX licence expression, such as CC0-1.0, MIT or LicenseRef-Owned"
            raise ValueError(problem) from error


class CorpusSettings(Settings):
    """How documents become sequences."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    """Where the documents come from."""
    holdout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the documents, chosen by a hash of each, that no teacher and no student trains on; the report needs one
    above 0."""
    context_tokens: int = Field(default=512, ge=2)
    """Most tokens of a sequence."""
    overlap_tokens: int = Field(default=64, ge=1)
    """Tokens that a window shares with the one before it: context that is not scored again."""
    normalisation: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation."""
    max_document_bytes: int = Field(default=64 * 2**20, ge=1)
    """A longer document is counted, reported and left out; it is never held in memory."""
    sequences_per_part: int = Field(default=256, ge=1)
    """Most sequences of one slice of the corpus, and so of one part; a slice ends by what it holds, at half of this or
    more, so that a change of the corpus moves the cuts beside it alone."""

    @model_validator(mode="after")
    def _consistent(self) -> CorpusSettings:
        if self.overlap_tokens >= self.context_tokens:
            raise ValueError(
                f"overlap_tokens ({self.overlap_tokens}) must be less than context_tokens ({self.context_tokens})"
            )
        _refuse_equal_names(self.sources)
        return self


def _refuse_equal_names(sources: tuple[SourceSettings, ...]) -> None:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"source names must differ: {', '.join(twice)} is given more than once")


class LoraSettings(Settings):
    """A low-rank adapter (LoRA) on the linear layers of the decoder."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the update."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an update."""
    last_layers: int | None = Field(default=None, ge=1)
    """Adapt only this many of the last layers; the backward pass then ends there. Without it, all."""


class OptimizerSettings(Settings):
    """AdamW with linear warm-up and a cosine down to a tenth."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; fractions are allowed."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Token budget of a batch, padding included; a longer sequence is a batch of its own."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """A stopped training goes on from the last multiple of this many steps."""


class VllmSettings(Settings):
    """How vLLM runs the teacher; for `engine: vllm` alone. All of it goes into the parts' ids."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine, over which each layer is split."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Share of a GPU's memory that the engine takes, what the sketches need included."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of the cache of keys and values; without it, what `gpu_memory_utilization` leaves, and 1 on a CPU."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens of one step of the engine; a longer sequence is taken in pieces."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Most sequences of one step."""
    chunk_rows: int = Field(default=128, ge=1, le=8192)
    """Positions whose logits exist at one time."""
    enforce_eager: bool = True
    """Run the model as it is; false: let vLLM compile it first, which takes minutes."""
    own_process: bool = False
    """Run the engine in a process of its own, and not in the worker's."""

    @model_validator(mode="after")
    def _consistent(self) -> VllmSettings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs"
                f" ({self.max_num_seqs})"
            )
        return self


class TeacherSettings(Settings):
    """The model that gives the targets, and how it is adapted to the corpus."""

    model: str = Field(min_length=1)
    """Folder or hub name (`name`, `owner/name`) of a causal language model."""
    revision: str | None = None
    """Revision on the hub."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the model."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: DataType = "float32"
    """Type of weights and activations while scoring; `auto` is bfloat16 where the device has it natively."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads of one engine."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Token budget of a batch of the transformers engine, padding included."""
    vllm: VllmSettings = VllmSettings()
    """How vLLM runs it."""
    folds: int = Field(default=2, ge=0)
    """K adapters, each trained on the documents outside its fold, which it then scores; 0: the model as it is."""
    lora: LoraSettings = LoraSettings()
    """Shape of the adapters."""
    optimizer: OptimizerSettings = OptimizerSettings(epochs=2.0)
    """How the adapters are trained."""
    training_dtype: DataType = "auto"
    """Type of the frozen weights while the adapters are trained."""
    retrain_growth: float = Field(default=0.1, ge=0)
    """An adapter is kept while all that it was trained on is still in the corpus, outside its fold, and the text there
    has grown by at most this share; 0: until there is a new document."""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSettings:
        if self.folds == 1:
            raise ValueError("folds must be 0 or at least 2: with one fold no document is outside it")
        if self.engine == "vllm" and ":" in self.device:
            raise ValueError("the vllm engine takes its GPUs from CUDA_VISIBLE_DEVICES; give `device: cuda`")
        return self


class AdaptiveSettings(Settings):
    """Bounds between which the local cluster grows while parts wait, and shrinks when workers have nothing to do."""

    minimum: int = Field(default=0, ge=0)
    """Fewest workers."""
    maximum: int = Field(ge=1)
    """Most workers."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptiveSettings:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must be at most maximum ({self.maximum})")
        return self


class ClusterSettings(Settings):
    """Where the tasks run: a local Dask cluster, or a running one."""

    workers: int = Field(default=1, ge=1)
    """Worker processes of the local cluster; each holds one engine."""
    adaptive: AdaptiveSettings | None = None
    """Let the local cluster grow and shrink; `workers` is then not used."""
    scheduler: str | None = None
    """Address of a running scheduler (tcp://host:port, tls://host:port); its workers need the resource `teacher=1`."""
    scheduler_file: str | None = None
    """File in which a running scheduler leaves its address (`dask scheduler --scheduler-file`); it may come later."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a part is tried, on another worker each time where there is one, before it is set aside."""
    retry_seconds: float = Field(default=2.0, ge=0)
    """Longest pause before the second attempt; twice that before the third and so on, at most a minute."""
    grace_seconds: float = Field(default=20.0, ge=0)
    """How long the parts in hand may take to finish after SIGTERM or Ctrl-C; what takes longer is dropped."""

    @property
    def most_workers(self) -> int:
        """Workers that the local cluster has at most."""
        return self.adaptive.maximum if self.adaptive else self.workers

    @model_validator(mode="after")
    def _one_cluster(self) -> ClusterSettings:
        named = [name for name in ("adaptive", "scheduler", "scheduler_file") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: only a local cluster is adapted from here")
        return self


class RetentionSettings(Settings):
    """The loss on other data that keeps what the model knew."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    """Text outside the style; read and split as the corpus is."""
    weight: float = Field(default=0.1, ge=0)
    """Retention weight lambda."""
    objective: Literal["kl", "ce"] = "kl"
    """`kl`: full KL to the frozen base model; `ce`: cross-entropy on the text."""
    batch_tokens: int = Field(default=512, ge=1)
    """Token budget of the retention batch of a step."""

    @model_validator(mode="after")
    def _consistent(self) -> RetentionSettings:
        _refuse_equal_names(self.sources)
        return self


class BaselineSettings(Settings):
    """Ordinary fine-tuning on the same tokens, with the same steps, at its own best learning rate."""

    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-4, 2e-4, 5e-4), min_length=1)
    """Each is trained in full; the best on the hold-out is the baseline, which favours the baseline."""
    retention_weight: float = Field(default=0.0, ge=0)
    """Retention weight of the baseline; ordinary fine-tuning has none."""


class TrainSettings(Settings):
    """KL fine-tuning of a light adapter on the stored targets."""

    model: str | None = None
    """Folder or hub name of the student; without it, the teacher's model."""
    revision: str | None = None
    """Revision on the hub."""
    objective: Literal["kl", "ce"] = "kl"
    """`kl`: the stored targets; `ce`: the corpus's own tokens, the same as alpha 1."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Human weight: share of the corpus's own token in the target, mixed in at load."""
    truncated: Literal["ghost", "renormalise"] = "ghost"
    """What stands for the tokens that a `topk` or `nucleus` sketch leaves out: `ghost` is one token with the mass of
    them all, `renormalise` scales the stored ones to 1, which teaches that the rest is impossible."""
    temperature: float = Field(default=1.0, gt=0)
    """Targets become p^(1 / temperature), renormalised, at load. Only where that is exact: with `full`, and with `topk`
    and `truncated: renormalise`; for the other kinds, set the temperature in `target`. The report compares with the
    targets as they are stored."""
    match_temperature: bool = False
    """Divide the student's logits by the targets' temperature too (that of `target` times that of `train`), and take
    the loss times its square; only with alpha 0, for a label has no temperature."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """What is made small: `forward` KL(target || student), for every kind of target; `reverse` KL(student || target) or
    `jensen_shannon`, of the distributions with `full`, of the head's tokens and the mass of the rest with `topk` and
    `nucleus` and `truncated: ghost`. A `threshold` sketch would bias them."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Beta of `jensen_shannon`: beta KL(target || m) + (1 - beta) KL(student || m), m being beta of the target and
    1 - beta of the student."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: DataType = "auto"
    """Type of the frozen weights; the adapter is float32. `auto` is bfloat16 where the device has it natively."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; without it, all cores."""
    chunk_positions: int = Field(default=512, ge=1)
    """Positions whose logits exist at one time in the loss."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Sequences among which the stream shuffles."""
    lora: LoraSettings = LoraSettings()
    """Shape of the adapter."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How it is trained."""
    retention: RetentionSettings | None = None
    """The loss on other data; without it, none."""
    baseline: BaselineSettings | None = BaselineSettings()
    """The fine-tuning that everything is compared with; null: none."""


class EvaluateSettings(Settings):
    """What the report measures."""

    num_samples: int = Field(default=24, ge=1)
    """Held-out beginnings that each model continues."""
    prompt_tokens: int = Field(default=24, ge=1)
    """Tokens of a beginning."""
    sample_tokens: int = Field(default=96, ge=8)
    """Most tokens of a continuation."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the whole distribution is sampled, nothing is cut."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Token budget of a scoring batch."""
    calibration_bins: int = Field(default=15, ge=2)
    """Bins of equal width of the calibration error."""


class Job(Settings):
    """A whole run, from human writing to an adapter and its report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the job; an output folder belongs to one name."""
    out: str = Field(min_length=1)
    """Where the output goes: a folder, or `s3://bucket/prefix`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the hold-out, the folds, the sketches, the order and the samples."""
    corpus: CorpusSettings
    teacher: TeacherSettings
    target: SketchSettings = ThresholdSketch()
    cluster: ClusterSettings = ClusterSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _exact_temperature(self) -> Job:
        kind, renormalised = self.target.kind, self.train.truncated == "renormalise"
        if self.train.temperature != 1 and kind != "full" and not (kind == "topk" and renormalised):
            raise ValueError(
                f"train.temperature {self.train.temperature:g} cannot be applied at load to targets of kind {kind};"
                " set target.temperature, which is applied at capture"
            )
        return self

    @model_validator(mode="after")
    def _unbiased_divergence(self) -> Job:
        kind, train = self.target.kind, self.train
        human = train.objective == "ce" or train.alpha > 0
        if train.match_temperature and human:
            raise ValueError("train.match_temperature needs `objective: kl` and alpha 0: a label has no temperature")
        if train.divergence == "forward":
            return self
        problem = None
        if train.objective == "ce" or train.alpha == 1:
            problem = "is infinite against a label alone; use `objective: kl` and an alpha below 1"
        elif kind == "threshold":
            problem = "is biased for targets of kind threshold, whose tail is sampled; use topk or full, or forward"
        elif kind != "full" and train.truncated != "ghost":
            problem = f"needs the mass that {kind} leaves out; set `train.truncated: ghost`"
        if problem is not None:
            raise ValueError(f"train.divergence {train.divergence} {problem}")
        return self

    @field_validator("out")
    @classmethod
    def _plain_path(cls, value: str) -> str:
        return _plain_uri(value.removeprefix("file://"))


def _plain_uri(value: str) -> str:
    """The URI, if it is fit to be written into an output."""
    if (problem := problem_of_uri(value)) is not None:
        raise ValueError(problem)
    return value


def digest_of(value: Any) -> str:
    """SHA-256, in hex, of a value's canonical JSON: sorted keys, no spaces, UTF-8. Models are dumped whole."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no canonical form")

    text = json.dumps(value, default=plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
