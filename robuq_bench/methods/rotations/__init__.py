"""Methods of the slot `rotation`: a file is a method, called what the file is called."""
