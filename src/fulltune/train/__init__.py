"""The train stage, from the ground up: what both sides share, optimizers, the loop, the worker, the parent.

The modules here are shared by both processes. `optim/` has the optimizers that are not transformers', `loop/` what is
changed of `transformers.Trainer` (one training step: `loop/guarded_step.py`), `worker/` one attempt in a process of its
own (`worker/attempt.py` is its line, `worker/best.py` chooses the weights that are kept), `parent/` starts attempts
and decides what follows one that failed (`parent/retry.py`).
"""
