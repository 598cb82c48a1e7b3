"""Begin or continue the training of a zoo model."""

from mobazoo.train.run import TrainPlan, TrainReport, plan_train, train

__all__ = ["TrainPlan", "TrainReport", "plan_train", "train"]
