"""What models are built from: layers on packed tokens, towers, heads, losses, and the drop-in."""
