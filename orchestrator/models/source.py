"""Find a base model and check, before any weight is read, that it can be tuned.

Finding and checking need only the model's small files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from orchestrator.errors import BadInput, Unreachable
from orchestrator.job.spec import BUILTIN, QUICKSTART, BaseModelSpec
from orchestrator.job.spec import looks_like_path as looks_like_path  # noqa: PLC0414 - re-export
from orchestrator.models.adapter_folder import instead_of_model
from orchestrator.models.builtin import BUILTIN_MODELS, builtin_model
from orchestrator.models.checks import (
    check_config_tokens,
    check_positions,
    check_stored_quantization,
)
from orchestrator.models.tokenizer import Tokenizer
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = "*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
NO_LIMIT = 1 << 20  # context length of a model whose configuration names none


Family: TypeAlias = Literal["causal", "seq2seq", "masked"]


@dataclass(frozen=True)
class BaseModelInfo:
    """The identity of a frozen model, and the sizes that a prompt must fit."""

    id: str
    revision: str
    model_type: str
    hidden_size: int
    vocab_size: int
    context_length: int
    fingerprint: str
    tokenizer_digest: str
    quantization: str = "none"


@dataclass(frozen=True)
class ModelSource:
    """A base model's files on this machine."""

    id: str
    revision: str
    path: Path
    quantization: str = "none"
    allow_remote_code: bool = False

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model, read by transformers.

        Raises BadInput if there is none, if it can't be read, or if it needs code that may not run.
        """
        quiet_transformers()
        if not (self.path / "config.json").is_file():
            if misplaced := instead_of_model(self.path):
                raise BadInput(f"base_model.id {self.id!r} {misplaced.what}", misplaced.step)
            raise BadInput(
                f"base_model.id {self.id!r}: {self.path} holds no config.json", MODEL_HINT
            )
        try:
            # transformers imports a model's module, and all its dependencies, on first use.
            with uncollected():
                from transformers import AutoConfig

                return AutoConfig.from_pretrained(
                    self.path, trust_remote_code=self.allow_remote_code
                )
        # Models check their configurations in many ways, each with errors of its own.
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise BadInput(
                    f"base_model.id {self.id!r} brings Python code of its own, which is not run",
                    "choose a model that transformers knows, or set base_model.allow_remote_code: "
                    "true if you trust it",
                ) from None
            raise BadInput(
                f"base_model.id {self.id!r} can't be read as a model: {first_line(error)}",
                MODEL_HINT,
            ) from None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises BadInput if it can't be used, or lacks the mask or end token that the family needs.
        """
        quiet_transformers()
        try:
            with uncollected():
                from transformers import AutoTokenizer

                tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                    self.path, trust_remote_code=self.allow_remote_code
                )
        # Tokenizer files fail in many ways: KeyError, TypeError, OSError, a Rust panic.
        except Exception as error:
            raise BadInput(
                f"base_model.id {self.id!r} has no usable tokenizer: {first_line(error)}",
                MODEL_HINT,
            ) from None
        needed = "mask_token" if self.family == "masked" else "eos_token"
        if getattr(tokenizer, f"{needed}_id") is None:
            problem = "no end token, which ends every target"
            if self.family == "masked":
                problem = "no mask token, where answers are filled in"
            raise BadInput(
                f"base_model.id {self.id!r}: the tokenizer has {problem}",
                f"choose a model whose tokenizer names a {needed}",
            )
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def weight_files(self) -> list[Path]:
        """Return the safetensors files of the model.

        Raises BadInput if there are none, or if the index names a missing file.
        """
        files = sorted(self.path.glob(WEIGHTS))
        if not files:
            raise BadInput(
                f"base_model.id {self.id!r}: no *.safetensors in {self.path}; pickled weights are "
                "not read",
                "convert the model with save_pretrained(..., safe_serialization=True)",
            )
        self._check_index(files)
        return files

    def _check_index(self, files: list[Path]) -> None:
        """Raise BadInput if the weights' index names a file that is missing, or can't be read."""
        index = self.path / WEIGHTS_INDEX
        if not index.is_file():
            return
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = f"{index.name} has no weight_map of files ({first_line(error)})"
            raise self.unusable_weights(reason) from None
        missing = sorted(needed - {file.name for file in files})
        if missing:
            raise self.unusable_weights(
                f"{index.name} names {', '.join(missing)}, not in the folder"
            )

    def unusable_weights(self, reason: Exception | str) -> BadInput:
        """Make the error for weights that can't be used, with the first line of ``reason``."""
        return BadInput(
            f"base_model.id {self.id!r}: the weights in {self.path} can't be used: "
            f"{first_line(reason)}",
            "fetch or save the model again",
        )

    @property
    def context_length(self) -> int:
        """The longest row, in tokens, that the model has positions for; NO_LIMIT if not named."""
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := getattr(self.config.get_text_config(), key, None), int):
                # RoBERTa's first position is its pad token's id + 1, and the earlier positions
                # take rows of the position table too.
                offset = 0
                if self.config.model_type in _OFFSET_POSITIONS:
                    offset = self.config.pad_token_id + 1
                return value - offset
        return NO_LIMIT

    def info(self, fingerprint: str) -> BaseModelInfo:
        """Describe the model; ``fingerprint`` is that of its weights."""
        config = self.config.get_text_config()
        return BaseModelInfo(
            id=self.id,
            revision=self.revision,
            model_type=config.model_type,
            hidden_size=_embedding_width(config),
            vocab_size=config.vocab_size,
            context_length=self.context_length,
            fingerprint=fingerprint,
            tokenizer_digest=tokenizer_digest(self._tokenizer),
            quantization=self.quantization,
        )

    @property
    def brings_model_code(self) -> bool:
        """True if the model has its own language model class and the spec allows its code."""
        classes = getattr(self.config, "auto_map", None) or {}
        return self.allow_remote_code and any(name in classes for name in _AUTO_CLASSES.values())

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def table_size(self) -> int:
        """Rows of the input embedding table; every token id has to be smaller."""
        return int(self.config.get_text_config().vocab_size)

    def check_tunable(self) -> None:
        """Raise BadInput for a model that can't be tuned, before any weight is read."""
        config = self.config
        if self.quantization != "none" and find_spec("bitsandbytes") is None:
            raise BadInput(
                f"base_model.quantization {self.quantization} needs the package bitsandbytes, "
                "which is not installed",
                "pip install bitsandbytes, or leave base_model.quantization out",
            )
        if not (self.brings_model_code or _is_language_model(config)):
            raise BadInput(
                f"base_model.id {self.id!r} is not a language model "
                f"(model_type {config.model_type!r}, architectures {config.architectures or []})",
                MODEL_HINT,
            )
        check_stored_quantization(self.id, config, self.quantization)
        check_positions(self.id, config, self.family, self.context_length, self.brings_model_code)
        check_config_tokens(self.id, config, self.family, self.path)


_AUTO_CLASSES: dict[Family, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
}
ENDINGS: dict[Family, tuple[str, ...]] = {
    "causal": ("ForCausalLM", "LMHeadModel"),
    "seq2seq": ("ForConditionalGeneration",),
    "masked": ("ForMaskedLM",),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the model's family, from its configuration alone."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    names = config.architectures or []
    if any(name.endswith(ENDINGS["causal"]) for name in names) or getattr(
        config, "is_decoder", False
    ):
        return "causal"
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return "masked" if config.model_type in MASKED else "causal"


def usual_family(model_type: str) -> Family:
    """Return the usual family of a model type, where no configuration is at hand."""
    from transformers.models.auto import modeling_auto as auto

    if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    return "masked" if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def _is_language_model(config: PreTrainedConfig) -> bool:
    from transformers.models.auto import modeling_auto as auto

    mapping = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    family, names = family_of(config), config.architectures or []
    ends = ENDINGS[family]
    return config.model_type in mapping[family] and (
        not names or any(name.endswith(ends) for name in names)
    )


def _embedding_width(config: PreTrainedConfig) -> int:
    """Return the width of the token embeddings, which some models project to the hidden size."""
    for key in ("embedding_size", "word_embed_proj_dim", "hidden_size"):
        if value := getattr(config, key, None):
            return int(value)
    raise BadInput(
        f"a model of type {config.model_type!r} does not say how wide its embeddings are",
        MODEL_HINT,
    )


MODEL_HINT = (
    f"give a language model: a hub id such as Qwen/Qwen2.5-0.5B, a local folder, or {QUICKSTART}"
)


def resolve_model(spec: BaseModelSpec, weights: bool = True) -> ModelSource:
    """Return the model's files, after checking that the model can be tuned.

    Files are made for a built-in model, found for a folder, and fetched for a hub id.
    ``weights=False`` fetches only configuration and tokenizer, which is enough to refuse an
    unusable model early. Raises BadInput, or Unreachable when the hub can't be reached.
    """
    if spec.id.startswith(BUILTIN):
        path = builtin_model(known_builtin(spec.id))
    elif Path(spec.id).expanduser().exists() or looks_like_path(spec.id):
        path = local_folder(spec.id)
    else:
        path = _from_hub(spec, weights)
    source = ModelSource(spec.id, spec.revision, path, spec.quantization, spec.allow_remote_code)
    source.check_tunable()
    return source


def known_builtin(name: str) -> str:
    """Return the name of a built-in model without its prefix.

    Raises BadInput, which lists the built-in models, for an unknown name.
    """
    bare = name.removeprefix(BUILTIN)
    if bare not in BUILTIN_MODELS:
        raise BadInput(
            f"base_model.id {name!r} is unknown; built-in models are "
            + ", ".join(BUILTIN + model for model in BUILTIN_MODELS),
            MODEL_HINT,
        )
    return bare


def local_folder(name: str) -> Path:
    """Return the folder that a base model's id names.

    Raises BadInput for a file and for a path that does not exist.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise BadInput(
            f"base_model.id {name!r}: the folder {folder.resolve()} {problem}", MODEL_HINT
        )
    return folder.resolve()


def _from_hub(spec: BaseModelSpec, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = list(SMALL_FILES)
    if weights:
        patterns.append(WEIGHTS)
    if spec.allow_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(spec.id, revision=spec.revision, allow_patterns=patterns))
    except GatedRepoError:
        raise BadInput(
            f"base_model.id {spec.id!r} is gated", "ask for access on the hub, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise BadInput(
            f"base_model.revision {spec.revision!r} does not exist for {spec.id!r}", MODEL_HINT
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BadInput(
            f"base_model.id {spec.id!r} is neither a folder here nor a model on the hub", MODEL_HINT
        ) from None
    # Without a network or cache, or with HF_HUB_OFFLINE, the hub client raises many types.
    except Exception as error:
        raise hub_unreachable(f"base_model.id {spec.id!r}", error) from None


def hub_unreachable(name: str, error: Exception) -> Unreachable:
    """Make the error for a hub name that is neither cached nor reachable."""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return Unreachable(
        f"{name} is not in the local cache and the hub can't be reached{offline}: "
        f"{type(error).__name__}",
        "connect to the network, point HF_HOME at a cache that holds it, or use a local path",
    )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the sha256 of the tokenizer's serialised form.

    Tokenizers with equal digests split texts in the same way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def quiet_transformers() -> None:
    """Silence the libraries' progress bars and notices, which would break up our own output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PEFT imports bitsandbytes for LoRA, quantized or not, and bitsandbytes then recommends a
    # package with faster 4-bit products for CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
