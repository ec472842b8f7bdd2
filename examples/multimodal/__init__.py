"""Image and text classified together, privately: a bitransformer, confounders, a modality that is missing."""
