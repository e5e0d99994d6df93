"""Where numbers and pictures go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, Prometheus."""
