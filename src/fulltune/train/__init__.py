"""The train stage: attempts in processes of their own, under guard.

From the ground up: the modules here are shared by both processes; `optim/` has the optimizers that are not
transformers'; `loop/` what is changed of `transformers.Trainer`; `worker/` one attempt (`attempt.py` is its line);
`parent/` starts attempts and decides what follows (`retry.py` is its line).

- One training step: `loop/guarded_step.py`.
- Which weights are kept: `worker/best.py`.
- What happens when memory runs out: `parent/next_attempt.py`.
"""
