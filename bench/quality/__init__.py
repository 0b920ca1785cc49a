"""bench.quality: what a real sentence encoder loses and gains when it is converted to 4,096 tokens without training."""
