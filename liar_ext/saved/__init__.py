"""What a job keeps of its work: tensors in sealed files, in the folder of a checkpoint."""
