"""The parts of `make_golden.py`, in the order of use.

`families` the models and their options, `draw` random weights and batches, `wide` the f64 side, `compute` forward,
backward and training, `expected` a family's own numbers, `runs` the trained runs, `peft_methods` what PEFT makes.

Conventions of all of them:

* T tokens, V vocabulary, r rank. A weight W is [out, in]; an adapter is B [out, r], R [r, r], A [r, in].
* f32 is what transformers computes as it stands. f64 is the same model widened, with nothing rounded to f32 inside;
  it is only there to measure the rounding of f32. Both start from the same f32 values.
* A loss is the mean over a batch's labels: the cross-entropy of logits[:, :-1] against labels[:, 1:] over the labels
  that are not -100 where every token has one, and of logits against labels where a text has one; of labels that are
  numbers, the squared error.
* A draw that a correct implementation could not be held to (a gradient too near zero to have a sign, two singular
  values too near each other, two tokens too near in a greedy choice) is drawn again; see `draw.best`.
"""
