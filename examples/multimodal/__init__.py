"""Image and text classified together, privately: a multimodal bitransformer, confounders, and a modality that is missing."""
