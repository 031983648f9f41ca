"""Known answers: a few inputs and what the graphs give for them, which a server asks for again before it serves anybody.

A certificate speaks of the machine that made it. Another processor, driver or release of ONNX Runtime may compute something
else, by a fault of theirs or of ours: sums of eight-bit products that saturated were one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from export.bundle import KnownAnswer, KnownAnswers
from export.graph_runner import EOS, ClassifyGraphs, SequenceGraphs

COUNT, MOST_TOKENS = 4, 32
"""How many, and how long their outputs may be: no more than a warm-up costs."""
MOST_DIFFERENCE = {"fp32": 0.05, "fp16": 0.2, "int8": 0.1}
"""On average, of log-probabilities and other numbers of about that size. Kernels add in another order (on CUDA in TF32), and in
eight bits a value on the edge between two steps of its scale falls to the other side; what is broken is off by one and more."""


def of_sequences(graphs: SequenceGraphs, precision: str, inputs: Sequence[Sequence[int]]) -> KnownAnswers:
    """What greedy decoding gives for the first inputs, by the graphs alone: tokens that any shortlist holds."""
    answers = []
    for ids in inputs[:COUNT]:
        room = graphs.config.max_target_length - (0 if graphs.config.has_encoder else len(ids))
        output = graphs.greedy([ids], min(MOST_TOKENS, room))[0]
        output = output if len(output) == min(MOST_TOKENS, room) else [*output, EOS]
        (logits,) = graphs.forced([ids], [output])
        log_p = torch.from_numpy(logits).double().log_softmax(-1).numpy()
        places = np.searchsorted(graphs.ids, output)
        answers.append(KnownAnswer(input=list(ids), output=output, values=log_p[np.arange(len(output)), places].tolist()))
    return KnownAnswers(most_difference=MOST_DIFFERENCE[precision], answers=answers)


def of_classifier(graphs: ClassifyGraphs, precision: str, inputs: Sequence[Sequence[int]]) -> KnownAnswers:
    answers = [KnownAnswer(input=list(ids), output=[], values=graphs.run([ids])[0].tolist()) for ids in inputs[:COUNT]]
    return KnownAnswers(most_difference=MOST_DIFFERENCE[precision], answers=answers)
