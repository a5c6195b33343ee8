"""What comes out: embedding, neighbours, clusters, layout, markers, metrics and the atlas that holds them."""
