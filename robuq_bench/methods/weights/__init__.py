"""Methods of the slot `weight`: a file is a method, called what the file is called."""
