"""What makes the scripts comfortable and robust. A first reading can skip this folder."""
