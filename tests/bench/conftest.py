import torch

# Tiny networks gain nothing from a second thread, and lose tenfold when parallel test workers contend for the cores.
torch.set_num_threads(1)
