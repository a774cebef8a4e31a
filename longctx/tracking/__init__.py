"""Trackers of a run: TensorBoard, Weights & Biases and MLflow, which get what `metrics.jsonl` gets."""
