"""What a worker measures."""

from __future__ import annotations

from cortex_common.telemetry.metrics import counter, gauge, histogram

ATTENDED = gauge("cortex_worker_attended", "1 while the line to the coordinator is open.")
STEPS = counter("cortex_worker_training_steps_total", "Optimiser steps done.")
EXAMPLES = counter("cortex_worker_training_examples_total", "Examples trained on, repetitions counted.")
PHASE_SECONDS = histogram("cortex_worker_phase_seconds", "Time a piece of work spent in a phase.", ("phase",))
BYTES_UP = counter("cortex_worker_sent_bytes_total", "Sealed bytes of updates sent.")
BYTES_DOWN = counter("cortex_worker_received_bytes_total", "Sealed bytes of models received.")
OUTCOMES = counter("cortex_worker_outcomes_total", "Pieces of work that are over.", ("work", "outcome"))
TRAINERS_STARTED = counter("cortex_worker_trainers_started_total", "Trainer processes started.")
TRAINERS_CRASHED = counter("cortex_worker_trainers_crashed_total", "Trainer processes that ended by themselves.")
SLOTS = gauge("cortex_worker_slots", "Jobs this worker can train at a time.")
JOBS = gauge("cortex_worker_jobs", "Jobs this worker has now.")
