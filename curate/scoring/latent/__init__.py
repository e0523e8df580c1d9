"""Influence on the latents of a sparse autoencoder, down to tokens (RepInf): three backends that agree."""
