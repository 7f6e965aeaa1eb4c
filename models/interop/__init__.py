"""Our models in timm and in Hugging Face transformers."""
