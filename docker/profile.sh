# Login shells, in which KubeRay and Ray's cluster launcher start Ray, forget the image's PATH.
export PATH="/opt/draf/bin:$PATH"
