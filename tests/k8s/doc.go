// Package k8s applies what is in buildkit/ to a real Kubernetes of one node, runs the
// function there as faas-netes does, and builds through it. It takes half an hour on a
// fresh machine, of which half is compiling Kubernetes, and so has a build tag, k8s:
// make test-k8s.
package k8s
