"""A record's numbers for TensorBoard, MLflow and W&B."""
