"""What lies on disk: adapter folders and model folders, their tensors' names and layouts."""
