"""What went wrong in a training, from its log: of a run folder, or of a Trainer that is not fulltune's."""
