"""Times each training step of a transformers Trainer."""

import time

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds and CPU-seconds of each step, data loading between steps left out."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        """Before the batch is run."""
        self._begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        """After the optimizer's step."""
        self.seconds.append(time.perf_counter() - self._begun[0])
        self.cpu_seconds.append(time.process_time() - self._begun[1])
