"""What a run leaves behind for people to read: JSONL and TensorBoard records, throughput, GPU sensors."""
