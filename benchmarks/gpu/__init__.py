"""The engine on a GPU, with nothing but MLX, our package and models of random weights."""
