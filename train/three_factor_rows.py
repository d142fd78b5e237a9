"""The rows of the menu for the methods with a matrix of r×r between two factors. Imports no torch."""

from __future__ import annotations

from train.menu_row import Capabilities, Method
from train.options.three_factor import InttuneOptions, LoraSbOptions, LoraXsOptions, NloraOptions, SloraOptions

ROWS = (
    Method(
        name="lora-sb",
        title="LoRA-SB",
        summary="Trains one r×r matrix a layer between frozen factors that span the first step of full fine-tuning, "
        "estimated on your rows. Far fewer parameters than LoRA.",
        when="When adapters must be small, or optimiser memory is short. Take 5 to 10 times the learning rate of LoRA, "
        "and a larger rank than with LoRA.",
        cost="r² trained parameters a layer. Before the first step: a forward and backward pass of every sample with "
        "gradients of whole weights, within parameters.gradient_memory, and an SVD of every weight's gradient.",
        output="A plain LoRA on the untouched base.",
        options=LoraSbOptions,
        implementation="train.methods.lora_sb:LoraSb",
        arxiv="2411.19557",
        reference_url="https://arxiv.org/abs/2411.19557",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="lora-xs",
        title="LoRA-XS",
        summary="Trains one r×r matrix a layer between frozen singular vectors of the weight. What LoRA-SB is compared "
        "with.",
        when="As LoRA-SB, when no estimate on the data is wanted; LoRA-SB usually learns better at the same rank.",
        cost="r² trained parameters a layer, and an SVD of every weight before the first step.",
        output="A plain LoRA on the untouched base.",
        options=LoraXsOptions,
        implementation="train.methods.lora_xs:LoraXs",
        arxiv="2405.17604",
        reference_url="https://arxiv.org/abs/2405.17604",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="slora",
        title="SLoRA",
        summary="LoRA with a trained r×r matrix between A and B: learns faster for a few more parameters.",
        when="When LoRA learns slowly and the adapter shall begin exactly at the base model.",
        cost="r·(d_in + d_out + r) trained parameters a layer.",
        output="A plain LoRA on the untouched base.",
        options=SloraOptions,
        implementation="train.methods.slora:Slora",
        arxiv="2502.14482",
        reference_url="https://arxiv.org/abs/2502.14482",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="nlora",
        title="NLoRA",
        summary="SLoRA started at rows and columns of the weights (Nyström), which costs no SVD. Changes the model a "
        "little before the first step unless residual is set.",
        when="When few steps are available, as PiSSA, with a start that costs nothing.",
        cost="r·(d_in + d_out + r) trained parameters a layer.",
        output="A plain LoRA on the untouched base; of twice the rank with residual.",
        options=NloraOptions,
        implementation="train.methods.nlora:Nlora",
        arxiv="2502.14482",
        reference_url="https://arxiv.org/abs/2502.14482",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="inttune",
        title="IntTune",
        summary="The start of NLoRA, of which only the r×r matrix is trained: about a hundredth of LoRA's parameters.",
        when="When adapters must be small and no estimate on the data is wanted; LoRA-SB has better founded factors.",
        cost="r² trained parameters a layer.",
        output="A plain LoRA on the untouched base.",
        options=InttuneOptions,
        implementation="train.methods.inttune:Inttune",
        arxiv="2502.14482",
        reference_url="https://arxiv.org/abs/2502.14482",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
)
