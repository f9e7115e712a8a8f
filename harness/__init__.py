"""ssodbench: which semi-supervised object detector gives how much mAP, at which label ratio, for how much compute."""
