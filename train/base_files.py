"""A base model as files: where they are, and what transformers makes of them. No code of a repository is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from artifacts.errors import RequestInvalid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base model.

    Attributes:
        name: what an adapter's configuration shall call it.
        location: a folder, or a repository of the hub.
        revision: of the repository.
    """

    name: str
    location: str
    revision: str | None = None

    def load(self, auto_class: Any, kind: str, *, dtype: str, device: str) -> PreTrainedModel:
        """The model as one of transformers' automatic classes makes it; see `load_with_info`."""
        return self.load_with_info(auto_class, kind, dtype=dtype, device=device)[0]

    def load_with_info(
        self, auto_class: Any, kind: str, *, dtype: str, device: str, **options: Any
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model for evaluation, with no gradients, and what transformers tells of the loading.

        No pickle is read.

        Args:
            kind: what the class stands for, in words.
            dtype: a torch dtype's name, or "auto": as stored.

        Raises:
            RequestInvalid: it can not be loaded.
        """
        import train.quantised.loading  # noqa: F401 (teaches transformers our packed weights)

        try:
            model, info = auto_class.from_pretrained(
                self.location,
                revision=self.revision or "main",
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                low_cpu_mem_usage=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            raise RequestInvalid(
                f"The base model {self.name!r} can not be loaded: {error}",
                hint=f"Its folder needs config.json and safetensors files of a {kind}.",
            ) from error
        model.requires_grad_(False)
        model.name_or_path = self.name  # PEFT writes it into the adapter's configuration
        return model.to(device).eval(), info

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the model.

        Raises:
            RequestInvalid: there is none, or it can not be loaded.
        """
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = self._read(AutoTokenizer, "tokenizer", "files of its tokenizer")
        return found

    def config(self) -> PretrainedConfig:
        """Raises RequestInvalid when there is none, or it can not be read."""
        from transformers import AutoConfig

        found: PretrainedConfig = self._read(AutoConfig, "configuration", "config.json")
        return found

    def _read(self, auto_class: Any, what: str, files: str) -> Any:
        from huggingface_hub.errors import StrictDataclassError

        broken = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError)
        try:
            return auto_class.from_pretrained(self.location, revision=self.revision or "main", trust_remote_code=False)
        except (*broken, StrictDataclassError) as error:  # of a file with values of wrong types it raises what comes
            raise RequestInvalid(
                f"The {what} of the base model {self.name!r} can not be loaded: {error}",
                hint=f"Its folder needs the {files}.",
            ) from error
