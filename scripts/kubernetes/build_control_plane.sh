#!/usr/bin/env bash
# Builds a real kube-apiserver and kube-controller-manager (1.20.2) from Debian's source package `kubernetes`, which carries
# all it imports, with Debian's Go, and takes etcd from Debian's package. Nothing is installed and root is not needed. The
# package's addresses are the machine's own apt sources. Prints the folder that holds the three binaries:
#   ./scripts/kubernetes/build_control_plane.sh [folder]       default: ${XDG_CACHE_HOME:-~/.cache}/gradwire/kubernetes
# Six minutes of two cores and 2 GB while it builds, once per machine; 200 MB stay.
set -euo pipefail

folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/gradwire/kubernetes}
version=1.20.2
binaries=$folder/$version
commands=(etcd kube-apiserver kube-controller-manager)

built() {
    local command
    for command in "${commands[@]}"; do [ -x "$binaries/$command" ] || return 1; done
}

mkdir -p "$folder"
exec 9>"$folder/lock" && flock 9 # a second caller waits for the first one's build
if built; then
    echo "$binaries"
    exit
fi
exec 3>&1 1>&2 # the folder's name is all that goes to stdout

if ! grep -qsx 'VERSION_CODENAME=bookworm' /etc/os-release || ! command -v apt-get >/dev/null; then
    echo "A control plane is built on Debian 12 alone, out of its packages; set KUBECONFIG to a cluster for tests, such as kind's."
    exit 3
fi

work=$folder/build
rm -rf "$work"
mkdir -p "$work"/{sources,lists/partial,cache/archives/partial,debs,root,go/src/k8s.io,go-cache,bin}
cd "$work"

# The machine's Debian sources, with their source packages, in lists of our own.
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    case $list in
    *.sources) sed 's/^Types:.*/Types: deb deb-src/' "$list" >"sources/$(basename "$list")" ;;
    *.list) [ ! -e "$list" ] || { cat "$list" && sed -n 's/^deb /deb-src /p' "$list"; } >"sources/$(basename "$list")" ;;
    esac
done
apt=(-q -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources" -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
apt-get "${apt[@]}" update
apt-get "${apt[@]}" --download-only --only-source source kubernetes
tar xzf kubernetes_*.orig.tar.gz -C go/src/k8s.io
mv "go/src/k8s.io/kubernetes-$version" go/src/k8s.io/kubernetes
(cd debs && apt-get "${apt[@]}" download etcd-server golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev)
for package in debs/*.deb; do dpkg -x "$package" root; done

# Debian's Go is spread over /usr/lib and /usr/share and tied together by absolute links.
mkdir goroot
cp -a root/usr/lib/go-1.19/. goroot/
rm -rf goroot/{src,test,api,misc} goroot/pkg/include
cp -aL root/usr/share/go-1.19/src goroot/src
cp -aL root/usr/share/go-1.19/pkg/include goroot/pkg/
export GOROOT=$work/goroot GOPATH=$work/go GOCACHE=$work/go-cache GOPROXY=off GO111MODULE=off CGO_ENABLED=0 GOFLAGS=
export PATH=$GOROOT/bin:$PATH

# Go 1.18 and newer need reflect2 1.0.2; with the vendored 1.0.1, requests with a map panic.
reflect2=$GOPATH/src/k8s.io/kubernetes/vendor/github.com/modern-go/reflect2
rm -f "$reflect2"/*.go "$reflect2"/*.s
cp root/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$reflect2/"
rm -f "$reflect2"/*_test.go

# The one generated file that the source package lacks: the OpenAPI definitions of every type that asks for them.
cd "$GOPATH/src/k8s.io/kubernetes"
go build -o "$work/bin/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(grep -rl --include='*.go' -E '^// \+k8s:openapi-gen=true' pkg staging/src |
    grep -vE '_test|_examples|sample-apiserver' | xargs -n1 dirname | sort -u |
    sed 's#^staging/src/#k8s.io/kubernetes/vendor/#; s#^pkg#k8s.io/kubernetes/pkg#' | paste -sd,)
"$work/bin/openapi-gen" --go-header-file hack/boilerplate/boilerplate.generatego.txt -i "$packages" \
    -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi -r "$work/violations.txt"

for command in kube-apiserver kube-controller-manager; do
    echo "building $command"
    go build -ldflags "-s -w" -o "$work/bin/$command" "./cmd/$command"
done

mkdir -p "$binaries"
mv "$work"/bin/kube-* "$work/root/usr/bin/etcd" "$binaries/"
cd "$folder"
chmod -R u+w "$work" && rm -rf "$work"
echo "$binaries" >&3
