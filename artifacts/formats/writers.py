"""The table of writers."""

from __future__ import annotations

from artifacts.formats.comfy import ComfyWriter
from artifacts.formats.diffusers import DiffusersWriter
from artifacts.formats.gguf import GgufWriter
from artifacts.formats.kohya import KohyaWriter
from artifacts.formats.peft import PeftWriter
from artifacts.formats.writing import Writer

WRITERS: dict[str, Writer] = {
    writer.name: writer for writer in (PeftWriter(), DiffusersWriter(), KohyaWriter(), ComfyWriter(), GgufWriter())
}
