"""What a model is trained for and judged by: a task brings the model, its batches, its loss and its held-out items."""

from attn_plugins.training.tasks.task import Task, held_out_losses, shown, train_task

__all__ = ["Task", "held_out_losses", "shown", "train_task"]
