"""The oracle: a plain eager PyTorch LaViDa-LLaDA whose parameter names are the checkpoint's tensor names."""
