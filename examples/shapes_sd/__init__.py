"""ShapesSD: a Stable Diffusion of two megabytes that draws circles and squares, made and measured here."""
