"""Both training stages, on any number of processes; how they are started is not known here."""
