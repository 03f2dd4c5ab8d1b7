"""Training: a plain loop that survives kills, checkpoints that are verified, and a log that resumes with them."""

from .checkpoint import (Checkpoint, CheckpointError, best_checkpoint, list_checkpoints, load_checkpoint, restore,
                         save_checkpoint)
from .evaluate import accuracy
from .log import RunLog
from .loop import History, Trainer
from .seeds import capture_rng, deterministic, restore_rng, seed_everything
from .source_free import TwoHeads, learning_rate_factor, target_weight
from .weights import load_weights, save_weights

__all__ = ["Checkpoint", "CheckpointError", "History", "RunLog", "Trainer", "TwoHeads", "accuracy", "best_checkpoint",
           "capture_rng", "deterministic", "learning_rate_factor", "list_checkpoints", "load_checkpoint", "load_weights",
           "restore", "restore_rng", "save_checkpoint", "save_weights", "seed_everything", "target_weight"]
