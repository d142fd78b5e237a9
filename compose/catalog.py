"""The table of composition methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.menu import find_row, parse_options
from compose.menu_row import Capabilities, Method
from compose.options.baselines import CompositeOptions, MergeOptions, SwitchOptions
from compose.options.clora import CloraMaskOnlyOptions, CloraOptions
from compose.options.common import ComposeOptions
from compose.options.freefuse import FreefuseOptions
from compose.options.fusion import GradientFusionOptions, ZipLoraOptions
from compose.options.k_lora import KLoraOptions
from compose.options.lora_composer import LoraComposerOptions
from compose.options.omg import OmgOptions

_ROWS = (
    Method(
        name="merge",
        title="Weighted sum",
        summary="All adapters at once with their weights, under one prompt with all triggers.",
        when="To begin with, and to compare with: try several weights.",
        cost="As a plain generation.",
        options=MergeOptions,
        implementation="compose.methods.merge:Merge",
        arxiv=None,
        reference_url="https://huggingface.co/docs/diffusers/using-diffusers/merge_loras",
        capabilities=Capabilities(),
    ),
    Method(
        name="switch",
        title="LoRA-Switch",
        summary="One adapter at a time: after every few steps the next takes over, under one prompt with all triggers.",
        when="As a cheap baseline, when adapters disturb each other in a weighted sum.",
        cost="As a plain generation.",
        options=SwitchOptions,
        implementation="compose.methods.switch:Switch",
        arxiv="2402.16843",
        reference_url="https://arxiv.org/abs/2402.16843",
        capabilities=Capabilities(),
    ),
    Method(
        name="composite",
        title="LoRA-Composite",
        summary="In every step each adapter predicts alone, and the mean of the predictions is taken.",
        when="As a baseline that guides by all adapters in every step.",
        cost="A plain generation for each concept.",
        options=CompositeOptions,
        implementation="compose.methods.composite:Composite",
        arxiv="2402.16843",
        reference_url="https://arxiv.org/abs/2402.16843",
        capabilities=Capabilities(),
    ),
    Method(
        name="clora",
        title="CLoRA",
        summary="A branch for each concept; the latent is moved until their attention maps part, and each branch's "
        "prediction counts only inside its own mask.",
        when="When concepts bleed into each other or one of them is missing from a weighted sum. Not every pair "
        "gains: compare with merge at several weights.",
        cost="A plain generation for each concept and one for the base, and a shortened forward and backward pass of "
        "each for every update.",
        options=CloraOptions,
        implementation="compose.methods.clora:Clora",
        arxiv="2403.19776",
        reference_url="https://arxiv.org/abs/2403.19776",
        capabilities=Capabilities(masks=True),
    ),
    Method(
        name="clora_mask_only",
        title="CLoRA without updates",
        summary="A branch for each concept, fused inside masks of their attention; the latent is left alone.",
        when="When time or memory is short for CLoRA, or to see what its update does.",
        cost="A plain generation for each concept and one for the base.",
        options=CloraMaskOnlyOptions,
        implementation="compose.methods.clora_mask_only:CloraMaskOnly",
        arxiv="2403.19776",
        reference_url="https://arxiv.org/abs/2403.19776",
        capabilities=Capabilities(masks=True),
    ),
    Method(
        name="freefuse",
        title="Masked outputs (FreeFuse)",
        summary="Masks are read from the attention of the first steps; then all adapters act in one pass, each kept to "
        "its concept's mask.",
        when="When concepts bleed into each other in a weighted sum and the passes of CLoRA are too many.",
        cost="A plain generation, and the first steps once more.",
        options=FreefuseOptions,
        implementation="compose.methods.freefuse:Freefuse",
        arxiv="2510.23515",
        reference_url="https://arxiv.org/abs/2510.23515",
        capabilities=Capabilities(masks=True),
    ),
    Method(
        name="omg",
        title="OMG with given masks",
        summary="The base model makes the scene; inside a mask that the user gives, a concept's adapter has its say in "
        "the noise.",
        when="When you know where each concept shall be: draw masks on the base model's own picture, or give boxes.",
        cost="A plain generation for each concept and one for the base.",
        options=OmgOptions,
        implementation="compose.methods.omg:Omg",
        arxiv="2403.10983",
        reference_url="https://arxiv.org/abs/2403.10983",
        capabilities=Capabilities(masks=True),
    ),
    Method(
        name="lora_composer",
        title="LoRA-Composer",
        summary="Every concept has a box: there, in one pass, its adapter reads its own words and sees no other box; "
        "the latent is moved until attention fills the boxes.",
        when="When you know where each concept shall be, and boxes alone do not make it appear there.",
        cost="A plain generation, and in the first steps a shortened forward and backward pass more.",
        options=LoraComposerOptions,
        implementation="compose.methods.lora_composer:LoraComposer",
        arxiv="2403.11627",
        reference_url="https://arxiv.org/abs/2403.11627",
        capabilities=Capabilities(masks=True),
    ),
    Method(
        name="k_lora",
        title="K-LoRA",
        summary="One concept and one style; in every layer and step the adapter with the larger entries acts alone, "
        "and the style gains over the steps.",
        when="To paint one concept in one style, without training.",
        cost="As a plain generation, after one look at every layer's ΔW.",
        options=KLoraOptions,
        implementation="compose.methods.k_lora:KLora",
        arxiv="2502.18461",
        reference_url="https://arxiv.org/abs/2502.18461",
        capabilities=Capabilities(maximum_concepts=1),
    ),
    Method(
        name="ziplora",
        title="ZipLoRA",
        summary="One concept and one style become one LoRA: vectors on the columns of both are learnt, so that each "
        "still does what it did alone.",
        when="To use one concept in one style again and again, at the price of a training.",
        cost="A short training; then as a plain generation.",
        options=ZipLoraOptions,
        implementation="compose.methods.ziplora:ZipLora",
        arxiv="2311.13600",
        reference_url="https://arxiv.org/abs/2311.13600",
        capabilities=Capabilities(yields="adapter", maximum_concepts=1),
    ),
    Method(
        name="gradient_fusion",
        title="Gradient fusion (Mix-of-Show)",
        summary="Several concepts become one LoRA that does in each layer what each adapter does to its own "
        "activations.",
        when="To use the same concepts together again and again.",
        cost="Samples of every adapter alone, and a linear problem in each layer; then as a plain generation.",
        options=GradientFusionOptions,
        implementation="compose.methods.gradient_fusion:GradientFusion",
        arxiv="2305.18292",
        reference_url="https://arxiv.org/abs/2305.18292",
        capabilities=Capabilities(yields="adapter", styles=False),
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def find_method(name: str) -> Method:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "composition", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> ComposeOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "compose", "composition", method, parameters)
