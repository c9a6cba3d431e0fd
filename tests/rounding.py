"""How far the log-probabilities of two right servers may lie apart: derived from the formats they round to, in this place alone.

The servers answer with the random checkpoint of `demo_lib.checkpoint`, whose weights make the reckoning short:

- A value that is rounded to p significant bits moves by 0.425 * 2^-p of itself (root mean square, over mantissas that are spread like
  those of measured numbers): 0.17 % in BF16 (p = 8), 2.7 % in E4M3 (p = 4).
- The last hidden state is normalised, and the rows of lm_head are random with a length of 1: logits have a spread of 1, and an error of
  the hidden state of a relative size e moves a log-probability by a normal deviate times e.
- Of the hidden state's variance the embedding has 1, the attention of all layers 0.5 at most (a context of one token; less, the more
  tokens an average is taken of), and the feed-forward parts 0.18. So attention's share is 0.3 at most.
- The stream of hidden states is rounded after each of the 2 * layers additions and once by the last norm. Within the parts there are
  some ten roundings more, of shares that make them count for 2. The two servers' roundings are taken as independent, which is more than
  they are: where the servers' values are equal, so are the roundings.
- An E4M3 cache counts with attention's share. Values that differ by a rounding of BF16 fall to different sides of a rounding of E4M3 now
  and then, and then differ by a whole step: root mean square, by about as much as one rounding to E4M3. It counts twice where one of the
  servers rounds the softmax's weights to E4M3 too, as SGLang's Triton backend does, the reference on CUDA. (libetap rounds them to 16
  bits; sums are FP32 everywhere, and attention's results in BF16 are among the ten.)
- Where logits are rounded, too, two that differ fall a whole step further apart at most: that is added to the limit.
- Three times the rest is allowed. Of the some 150 tokens that are compared, the furthest is expected at 2.7 times what the sum of
  independent errors would be.
"""

from __future__ import annotations

import math

SIGNIFICANT_BITS = {"bf16": 8, "fp16": 11, "e4m3": 4}
ATTENTION_SHARE = 0.3
LARGEST_LOGIT = 8  # no logit reaches it: they have a spread of 1


def rounding(form: str) -> float:
    """The relative error (root mean square) of a rounding to "bf16", "fp16" or "e4m3"."""
    return 0.425 * 2.0 ** -SIGNIFICANT_BITS[form]


def near_tie(limit: float) -> float:
    """Two candidates this close (in nats) may change places where log-probabilities differ by `limit`: each has an error of its own."""
    return math.sqrt(2) * limit


def largest_difference(
    layers: int, *, dtype: str = "bf16", fp8_cache: bool = False, fp8_weights: bool = False, logits: str = "fp32"
) -> float:
    """What the log-probabilities of two servers may differ by, in nats.

    layers: of the model; dtype: "bf16" or "fp16", that of its weights and activations
    fp8_cache: both keep the cache in E4M3; fp8_weights: one of them rounds the softmax's weights to it
    logits: "fp32", or the type that they are rounded to
    """
    squares = 2 * (2 * layers + 1 + 2) * rounding(dtype) ** 2
    if fp8_cache:
        squares += (1 + fp8_weights) * ATTENTION_SHARE * rounding("e4m3") ** 2
    step = LARGEST_LOGIT * 2.0 ** -SIGNIFICANT_BITS[logits] if logits != "fp32" else 0.0
    return 3 * math.sqrt(squares) + step
