"""How the counts lie on disk, and how they come back: per sample in order, and shuffled once into shards."""
