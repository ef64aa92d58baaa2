"""Methods of the slot `centring`: a file is a method, called what the file is called."""
