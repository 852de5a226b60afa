"""Training from scratch and on: the schedule, the optimizer, the losses, the one loop, its checkpoints, and the plan.

Pretraining, supervised fine-tuning and preference tuning differ only in `batches(step)` and `loss(model, batch)`;
everything else is `loop.train`. A step is numbered by the update that makes it: step 1 is the first update, and the
checkpoint `step_000500` holds the weights after update 500. What this leaves out: reading text (`data`), the network
(`model`), and several machines (every function whose result depends on the rank takes `rank` and `world`).
"""
