"""What ships with a checkpoint: these files are copied beside exported weights as remote code.

They import only torch, transformers and each other, so what trained is what ships.
"""
