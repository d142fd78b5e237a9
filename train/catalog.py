"""The table of training methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.menu import find_row, parse_options
from train.menu_row import PLAIN, TEXT_TASKS, Capabilities, Form, Method
from train.options.allora import AlloraOptions
from train.options.baselines import (
    AdaloraOptions,
    DoraOptions,
    EvaOptions,
    LoraFaOptions,
    LoraOptions,
    LoraPlusOptions,
    MissOptions,
    OloraOptions,
    PissaOptions,
    RsloraOptions,
    VeraOptions,
)
from train.options.bone import BoneOptions
from train.options.common import TrainOptions
from train.options.dylora import DyloraOptions
from train.options.ffa_lora import FfaLoraOptions
from train.options.flexora import FlexoraOptions
from train.options.gradnormlorp import GradnormlorpOptions
from train.options.increlora import IncreloraOptions
from train.options.loftq import LoftqOptions
from train.options.lora_bert import LoraBertOptions
from train.options.lq_lora import LqLoraOptions
from train.options.prompt_tuning import PromptTuningOptions
from train.options.smora import SmoraOptions
from train.options.three_factor import InttuneOptions, LoraSbOptions, LoraXsOptions, NloraOptions, SloraOptions

_ROWS = (
    Method(
        name="lora",
        title="LoRA",
        summary="Learns ΔW = alpha/r·B·A beside frozen weights. The one to begin with, and to compare with.",
        when="To begin with, and whenever the adapter shall load everywhere.",
        cost="r·(d_in + d_out) trained parameters a layer.",
        output="A plain LoRA: PEFT, transformers, vLLM and every merge load it.",
        options=LoraOptions,
        implementation="train.methods.lora:Lora",
        arxiv="2106.09685",
        reference_url="https://arxiv.org/abs/2106.09685",
        capabilities=Capabilities(exports="lora", mergeable=True, continues=PLAIN),
    ),
    Method(
        name="rslora",
        title="Rank-stabilised LoRA",
        summary="LoRA with scaling alpha/√r: the updates do not shrink as the rank grows. For ranks of 32 and above.",
        when="For ranks of 32 and above, where alpha/r makes LoRA learn slowly.",
        cost="As LoRA.",
        output="A LoRA with use_rslora set; loaders that do not know the flag scale it wrongly.",
        options=RsloraOptions,
        implementation="train.methods.rslora:RsLora",
        arxiv="2312.03732",
        reference_url="https://arxiv.org/abs/2312.03732",
        capabilities=Capabilities(exports="lora", mergeable=True, continues=PLAIN),
    ),
    Method(
        name="dora",
        title="DoRA",
        summary="Learns the norm of every output apart from its direction. Often better at small ranks; slower, and "
        "its adapters can not be merged.",
        when="At small ranks, when quality matters more than time.",
        cost="d_out more parameters a layer. Every forward pass forms the weight and its norms: expect about 1.5 "
        "times the time.",
        output="A DoRA adapter for PEFT. It can not be merged with others.",
        options=DoraOptions,
        implementation="train.methods.dora:Dora",
        arxiv="2402.09353",
        reference_url="https://arxiv.org/abs/2402.09353",
        capabilities=Capabilities(exports="dora", mergeable=False, continues=("dora",)),
    ),
    Method(
        name="pissa",
        title="PiSSA",
        summary="Trains the principal singular components of the weights. Learns faster than LoRA at first; exported "
        "as a plain LoRA of twice the rank.",
        when="When few steps are available: it learns faster than LoRA at first.",
        cost="As LoRA, and an SVD of every weight before the first step.",
        output="A plain LoRA of twice the rank on the untouched base.",
        options=PissaOptions,
        implementation="train.methods.pissa:Pissa",
        arxiv="2404.02948",
        reference_url="https://arxiv.org/abs/2404.02948",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="olora",
        title="OLoRA",
        summary="Trains an orthonormal start from a QR decomposition of the weights; exported as a plain LoRA of "
        "twice the rank.",
        when="As PiSSA, with a cheaper start.",
        cost="As LoRA, and a QR decomposition of every weight before the first step.",
        output="A plain LoRA of twice the rank on the untouched base.",
        options=OloraOptions,
        implementation="train.methods.olora:Olora",
        arxiv="2406.01775",
        reference_url="https://arxiv.org/abs/2406.01775",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="loftq",
        title="LoftQ",
        summary="Trains beside quantised weights, and starts at the best low-rank part of what quantising loses.",
        when="When the model shall run quantised: the adapter learns on the weights that it will meet there.",
        cost="As LoRA, and an SVD of every weight in each round before the first step. The quantised weights are kept "
        "in the precision of the training, so it takes no less memory than LoRA.",
        output="An adapter of Rankwise's own type with the recipe of its quantised base, loaded by train.declared, "
        "which can also fold it into a dense model. On the original weights it is another model, so it can not be "
        "merged.",
        options=LoftqOptions,
        implementation="train.methods.loftq:Loftq",
        arxiv="2310.08659",
        reference_url="https://arxiv.org/abs/2310.08659",
        capabilities=Capabilities(exports="loftq", mergeable=False),
    ),
    Method(
        name="lq-lora",
        title="LQ-LoRA",
        summary="Trains the factors beside a base model in 2 to 8 bits a weight; POST /models/{id}/quantize makes it.",
        when="When the base model is too large to train on in its own precision, or shall run in a few bits.",
        cost="As LoRA, and the unpacking of every weight twice in a step; the base model takes its few bits only. "
        "Quantising it comes before, once.",
        output="An adapter of Rankwise's own type for the quantised base model, loaded by train.declared, which can "
        "also fold it into a dense model.",
        options=LqLoraOptions,
        implementation="train.methods.lq_lora:LqLora",
        arxiv="2311.12023",
        reference_url="https://arxiv.org/abs/2311.12023",
        capabilities=Capabilities(exports="lq_lora", mergeable=False, tasks=TEXT_TASKS),
    ),
    Method(
        name="eva",
        title="EVA",
        summary="Starts A at the main directions of the layers' inputs on your data, and gives more rank to layers "
        "whose inputs vary more.",
        when="When the layers should share the rank as your data needs it.",
        cost="As LoRA, and some forward passes before the first step.",
        output="A plain LoRA with a rank of its own for each layer.",
        options=EvaOptions,
        implementation="train.methods.eva:Eva",
        arxiv="2410.07170",
        reference_url="https://arxiv.org/abs/2410.07170",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="adalora",
        title="AdaLoRA",
        summary="Begins with more rank than wanted and takes away, layer by layer, what matters least.",
        when="When the layers should share the rank as the training shows it.",
        cost="Begins with more rank than it ends with, so more memory than LoRA; scores every entry in each step.",
        output="A plain LoRA with a rank of its own for each layer.",
        options=AdaloraOptions,
        implementation="train.methods.adalora:Adalora",
        arxiv="2303.10512",
        reference_url="https://arxiv.org/abs/2303.10512",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="increlora",
        title="IncreLoRA",
        summary="Begins every layer at rank 1 and lets those that matter most grow, until a budget of ranks is spent.",
        when="When the layers should share a small budget as the training shows it, and one may need far more than the "
        "others. Give it a warm-up: each new component gets one of its own.",
        cost="As LoRA of the layers' mean rank, and room for the largest rank that a layer could reach. Scoring takes, "
        "in each step until the budget is spent, a product as large as the gradient of the full weight, and keeps the "
        "layers' inputs and output gradients until the step's end; score_steps and score=lambda make it cheap.",
        output="A plain LoRA; all layers have the largest rank, filled up with zeros, so that every loader reads it, "
        "or each its own with export=patterns.",
        options=IncreloraOptions,
        implementation="train.methods.increlora:Increlora",
        arxiv="2308.12043",
        reference_url="https://arxiv.org/abs/2308.12043",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="lora-plus",
        title="LoRA+",
        summary="LoRA in which B learns faster than A. Try it when LoRA learns slowly on wide models.",
        when="When LoRA learns slowly on a wide model.",
        cost="As LoRA.",
        output="A plain LoRA.",
        options=LoraPlusOptions,
        implementation="train.methods.lora_plus:LoraPlus",
        arxiv="2402.12354",
        reference_url="https://arxiv.org/abs/2402.12354",
        capabilities=Capabilities(exports="lora", mergeable=True, continues=PLAIN),
    ),
    Method(
        name="lora-fa",
        title="LoRA-FA",
        summary="LoRA with a frozen A: less memory for optimiser and activations.",
        when="When memory is short.",
        cost="r·d_out trained parameters a layer; the optimiser keeps nothing for A.",
        output="A plain LoRA.",
        options=LoraFaOptions,
        implementation="train.methods.lora_fa:LoraFa",
        arxiv="2308.03303",
        reference_url="https://arxiv.org/abs/2308.03303",
        capabilities=Capabilities(exports="lora", mergeable=True, continues=PLAIN),
    ),
    Method(
        name="vera",
        title="VeRA",
        summary="Learns two vectors per layer around shared random matrices: the fewest trained parameters.",
        when="When very many adapters are stored.",
        cost="r + d_out trained parameters a layer; the shared matrices cost time like a LoRA of their rank.",
        output="A VeRA adapter for PEFT. It can not be merged with others.",
        options=VeraOptions,
        implementation="train.methods.vera:Vera",
        arxiv="2310.11454",
        reference_url="https://arxiv.org/abs/2310.11454",
        capabilities=Capabilities(exports="vera", mergeable=False, continues=("vera",)),
    ),
    Method(
        name="miss",
        title="MiSS",
        summary="Learns one matrix per layer that acts on sums of groups of inputs: one factor instead of two.",
        when="For quick training with few parameters.",
        cost="r·d_out trained parameters a layer; sums instead of a product with A.",
        output="A MiSS adapter for PEFT, which a merge takes as the plain LoRA that it is exactly; the method bone "
        "trains the same and exports a plain LoRA.",
        options=MissOptions,
        implementation="train.methods.miss:Miss",
        arxiv="2409.15371",
        reference_url="https://arxiv.org/abs/2409.15371",
        capabilities=Capabilities(exports="miss", mergeable=True, continues=("miss",)),
    ),
    Method(
        name="allora",
        title="ALLoRA",
        summary="LoRA without dropout and scaling. Every row of ΔW learns fast while it is 0, and slower as it grows.",
        when="For short trainings that should leave the start sooner. The differences that its authors report are "
        "small; compare it with lora on your data. Under adamw take placement update.",
        cost="As LoRA, and the norms of the rows of ΔW once a step.",
        output="A plain LoRA of scaling 1.",
        options=AlloraOptions,
        implementation="train.methods.allora:Allora",
        arxiv="2410.09692",
        reference_url="https://arxiv.org/abs/2410.09692",
        capabilities=Capabilities(exports="lora", mergeable=True, continues=PLAIN),
    ),
    Method(
        name="bone",
        title="Bone",
        summary="Block-affine adaptation: one matrix per layer that all shards of the inputs share. Half of LoRA's "
        "parameters at the same rank, and still a plain LoRA in the end.",
        when="For quick training with few parameters, when the adapter shall load everywhere. The variants bat_col and "
        "bat_row learn a ΔW of full rank with as few parameters, for use with the same base weights only.",
        cost="r·d_out trained parameters a layer (bat_row r·d_in, mini r·mini_r); sums instead of a product with A. "
        "bat_col forms W + ΔW in every forward pass, which takes more time and memory as the layers grow; bat_row "
        "does not.",
        output="default and mini: a plain LoRA, exactly what was trained; its rank of 64 may be above the limit of a "
        "server (vLLM's max_lora_rank). bat_col: a MiSS adapter that PEFT loads. bat_row: an adapter of Rankwise's own "
        "type, loaded by train.declared. With lossy_rank the last two become a plain LoRA that loses something.",
        options=BoneOptions,
        implementation="train.methods.bone:make",
        arxiv="2409.15371",
        reference_url="https://arxiv.org/abs/2409.15371",
        capabilities=Capabilities(
            exports="lora",
            mergeable=True,
            continues=("miss",),
            variants={
                "bat_col": Form(exports="miss", mergeable=False),
                "bat_row": Form(exports="bat_row", mergeable=False),
            },
        ),
    ),
    Method(
        name="dylora",
        title="DyLoRA",
        summary="One training for every rank up to r: each step trains the adapter of a rank that is drawn, so that "
        "the first b components are the adapter of rank b.",
        when="When the rank is not decided: one training instead of one for each rank, and an adapter that is cut to "
        "smaller ranks afterwards. With scale_mode alpha_over_b, as published, the largest ranks learn less than LoRA "
        "of that rank does; scale_mode constant learns them better. It needs more steps than LoRA.",
        cost="Parameters, memory and time of a step as LoRA of the largest rank. The report measures every trained "
        "rank: so many evaluations more.",
        output="A plain LoRA of the largest rank that says which ranks it was trained for. GET "
        "/adapters/{id}/download?rank=b gives the plain LoRA of each of them, with the scaling that it was trained "
        "with; cut by hand, with the scaling of the whole, it would be too weak.",
        options=DyloraOptions,
        implementation="train.methods.dylora:Dylora",
        arxiv="2210.07558",
        reference_url="https://arxiv.org/abs/2210.07558",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="flexora",
        title="Flexora",
        summary="Learns on held-out rows which transformer layers need an adapter, then trains a new LoRA in those "
        "alone. Fewer parameters, and less over-fitting on small data.",
        when="When all layers over-fit, or a smaller and cheaper adapter is wanted and it is not known which layers "
        "can do without. Needs some hundred rows to hold out, and a quarter of the steps for the choice.",
        cost="In the first stage a step of LoRA in all layers, and as many passes over held-out rows as "
        "validation_batches says: twice the time where those are as many rows as a batch. Unrolling costs second "
        "derivatives besides. In the second stage less than LoRA, by what the left-out layers would take.",
        output="A plain LoRA that has the chosen layers alone; every loader reads it.",
        options=FlexoraOptions,
        implementation="train.methods.flexora:Flexora",
        arxiv="2408.10774",
        reference_url="https://arxiv.org/abs/2408.10774",
        capabilities=Capabilities(exports="lora", mergeable=True),
    ),
    Method(
        name="gradnormlorp",
        title="GradNormLoRP",
        summary="DoRA whose factors are trained by AdamW on projected gradients, with moments of a smaller rank than "
        "the adapter's, in 32 or 8 bits. mode full trains whole weights so.",
        when="When DoRA's quality is wanted and the optimiser's memory is short. It learns as DoRA does, not better: "
        "with memory to spare take dora.",
        cost="Parameters as DoRA. The optimiser keeps about proj_rank/rank of AdamW's bytes for A and B; with a "
        "proj_rank that is not below rank it saves nothing. A step takes about the time of DoRA's, in less memory: "
        "the norms of the rows are found without forming a weight. mode full: a gradient and a copy of every adapted "
        "weight.",
        output="A DoRA adapter for PEFT, in both modes. It can not be merged with others.",
        options=GradnormlorpOptions,
        implementation="train.methods.gradnormlorp:make",
        arxiv="2412.19616",
        reference_url="https://arxiv.org/abs/2412.19616",
        capabilities=Capabilities(exports="dora", mergeable=False, continues=("dora",)),
    ),
    Method(
        name="ffa-lora",
        title="FFA-LoRA",
        summary="Federated training of lora_B on several datasets, each by itself, with rounds of averaging; with "
        "differential privacy if asked for. lora_A stays as it was drawn, so the average is exact.",
        when="When rows of several owners shall not meet, or when no row may be found in the adapter (privacy). Take "
        "5 to 10 times the learning rate of LoRA. On one dataset without privacy there is no reason for it.",
        cost="r·d_out trained parameters a layer, of which each client gives back its own once a round. With privacy a "
        "step keeps the gradient of every row.",
        output="A plain LoRA.",
        options=FfaLoraOptions,
        implementation="train.methods.ffa_lora:FfaLora",
        arxiv="2403.12313",
        reference_url="https://arxiv.org/abs/2403.12313",
        capabilities=Capabilities(exports="lora", mergeable=True, tasks=("causal-lm",)),
    ),
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
    Method(
        name="smora",
        title="SMoRA",
        summary="One LoRA whose components are switched on and off for every token: tasks that pull in different "
        "directions get components of their own.",
        when="For one adapter on a mixture of tasks that a LoRA confuses. On a single task it costs more than a "
        "LoRA and seldom gains.",
        cost="r·(d_out + 2·d_in) trained parameters a layer, half as much again as LoRA on square weights; the router "
        "costs as much as lora_A.",
        output="An adapter of Rankwise's own type, loaded by train.declared; ΔW depends on the token, so it can not be "
        "merged.",
        options=SmoraOptions,
        implementation="train.methods.smora:Smora",
        arxiv="2501.15103",
        reference_url="https://arxiv.org/abs/2501.15103",
        capabilities=Capabilities(exports="smora", mergeable=False, continues=("smora",)),
    ),
    Method(
        name="lora-bert",
        title="LoRA-BERT",
        summary="Tells long non-coding RNA from protein-coding mRNA by a BERT of k-mers. The LoRA of its name is no "
        "low-rank adapter: mode full trains every weight, as published; mode lora, which is Rankwise's own, trains "
        "an adapter.",
        when="To classify transcripts. First mode full on much data, from a base model of `rankwise models kmers`; "
        "then mode lora, or full again, on the species or the kind of transcript that matters.",
        cost="mode full: every weight, with gradient and optimiser, 16 bytes each. mode lora: as LoRA, and the "
        "classifier and the pooler.",
        output="mode lora: a plain LoRA with the trained classifier and pooler in it, for PEFT; it can not be merged. "
        "mode full: a model, registered as a base model of its own.",
        options=LoraBertOptions,
        implementation="train.methods.lora_bert:make",
        arxiv="2411.08073",
        reference_url="https://arxiv.org/abs/2411.08073",
        capabilities=Capabilities(
            exports="lora",
            mergeable=False,
            tasks=("transcript-classification",),
            variants={"full": Form(exports="model", mergeable=False)},
        ),
    ),
    Method(
        name="prompt-tuning",
        title="Prompt tuning",
        summary="Learns a few vectors that stand before the input, and changes no weight.",
        when="When the adapter must be tiny, or one model serves many tasks at once; LoRA learns more.",
        cost="virtual_tokens·width trained parameters in all; every input is so many tokens longer. It wants a "
        "learning rate of about 2e-3.",
        output="A prompt tuning adapter for PEFT. It has no ΔW, so it can not be merged.",
        options=PromptTuningOptions,
        implementation="train.methods.prompt_tuning:PromptTuning",
        arxiv="2104.08691",
        reference_url="https://arxiv.org/abs/2104.08691",
        capabilities=Capabilities(exports="prompt_tuning", mergeable=False, tasks=("causal-lm",)),
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def find_method(name: str) -> Method:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "training", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> TrainOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "train", "training", method, parameters)
