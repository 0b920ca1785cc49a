"""The command `lsg-attn`."""
