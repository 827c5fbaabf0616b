{{/* The name of objects. */}}
{{- define "gradwire.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What tells the objects of a release apart. Argument: [root, component]. */}}
{{- define "gradwire.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "gradwire.labels" -}}
{{- $root := index . 0 -}}
{{ include "gradwire.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "gradwire.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Tells a proxy in front what the port speaks. */}}
{{- define "gradwire.appProtocol" -}}
{{ ternary "https" "kubernetes.io/h2c" (ne .Values.tls.secretName "") }}
{{- end -}}

{{- define "gradwire.httpProtocol" -}}
{{ ternary "https" "http" (ne .Values.tls.secretName "") }}
{{- end -}}

{{/* Refuses, in a sentence, what a schema cannot tell. */}}
{{- define "gradwire.check" -}}
{{- $trainers := dict "trainer" .Values.trainer -}}
{{- if .Values.jobs.enabled -}}
{{- $_ := set $trainers "jobs.trainer" (include "gradwire.jobTrainer" . | fromYaml) -}}
{{- end -}}
{{- range $where, $trainer := $trainers -}}
{{- if lt (int $trainer.terminationGracePeriodSeconds) (add (int $trainer.drainSeconds) 15 | int) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d; it must be at least drainSeconds and 15 more, %d, or what is under way is killed." $where (int $trainer.terminationGracePeriodSeconds) (add (int $trainer.drainSeconds) 15 | int)) -}}
{{- end -}}
{{- end -}}
{{- include "gradwire.checkNodes" . -}}
{{- if and .Values.tls.clientCa (not .Values.tls.secretName) -}}
{{- fail "tls.clientCa needs tls.secretName, a Secret with tls.crt, tls.key and ca.crt." -}}
{{- end -}}
{{- if not (or .Values.auth.secretName .Values.tls.clientCa .Values.auth.allowNoApiKey) -}}
{{- fail "Nothing says who may call: set auth.secretName, or tls.secretName and tls.clientCa, or auth.allowNoApiKey where something in front of Gradwire checks callers." -}}
{{- end -}}
{{- if and .Values.page.enabled (not .Values.trainer.enabled) -}}
{{- fail "page.enabled needs trainer.enabled: it is the trainer's own page." -}}
{{- end -}}
{{- if and .Values.page.enabled (not .Values.auth.secretName) -}}
{{- fail "page.enabled needs auth.secretName: a browser shows the page an API key." -}}
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.trainer.enabled) (not .Values.gateway.trainers) -}}
{{- fail "gateway.enabled without trainer.enabled needs gateway.trainers, the trainers it stands before." -}}
{{- end -}}
{{- if and .Values.gateway.enabled .Values.tls.clientCa -}}
{{- fail "gateway.enabled with tls.clientCa: clients of hosted services show API keys, not certificates. Use two releases." -}}
{{- end -}}
{{- if and .Values.gateway.httpRoute.enabled (not .Values.gateway.httpRoute.parentRefs) -}}
{{- fail "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs, the Gateways that it is attached to." -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.enabled needs grpcRoute.parentRefs, the Gateways that it is attached to." -}}
{{- end -}}
{{- if and .Values.jobs.enabled (index $trainers "jobs.trainer").persistence.existingClaim -}}
{{- fail "jobs.trainer.persistence.existingClaim: each job has a volume of its own; set it to \"\" where trainer.persistence names a claim." -}}
{{- end -}}
{{- if and .Values.jobs.enabled .Values.tls.clientCa -}}
{{- fail "jobs.enabled with tls.clientCa: client certificates are for trainers of your own; the control plane and its jobs know API keys alone. Use two releases." -}}
{{- end -}}
{{- end -}}

{{/* Refuses several nodes without what they need. */}}
{{- define "gradwire.checkNodes" -}}
{{- $nodes := .Values.trainer.nodes -}}
{{- $volume := .Values.trainer.persistence -}}
{{- if gt (int (dig "nodes" "count" 1 .Values.jobs.trainer)) 1 -}}
{{- fail (printf "jobs.trainer.nodes.count is %d; a trainer job runs on one node, so it must be 1. A trainer on several is a release's own (trainer.nodes.count)." (int .Values.jobs.trainer.nodes.count)) -}}
{{- end -}}
{{- if gt (int $nodes.count) 1 -}}
{{- if not .Values.trainer.enabled -}}
{{- fail (printf "trainer.nodes.count is %d, but trainer.enabled is false; the other nodes are this release's own trainer's." (int $nodes.count)) -}}
{{- end -}}
{{- if not (or $volume.existingClaim (eq $volume.accessMode "ReadWriteMany")) -}}
{{- fail (printf "trainer.nodes.count is %d, and every node reads and writes the trainer's volume: trainer.persistence.accessMode must be ReadWriteMany, with a storageClass that offers it, or trainer.persistence.existingClaim name a claim that all nodes can mount." (int $nodes.count)) -}}
{{- end -}}
{{- if and .Values.tls.clientCa (not $nodes.tls.secretName) -}}
{{- fail (printf "trainer.nodes.count is %d and tls.clientCa is true: nodes that join must show a certificate too. Set trainer.nodes.tls.secretName, a Secret with tls.crt and tls.key from the same root." (int $nodes.count)) -}}
{{- end -}}
{{- end -}}
{{- if and $nodes.tls.secretName (not .Values.tls.clientCa) -}}
{{- fail "trainer.nodes.tls.secretName is the certificate that nodes show to a trainer with tls.clientCa, which is false." -}}
{{- end -}}
{{- end -}}

{{/* The trainer values of jobs: those of `trainer`, and where they differ; each is on one node. */}}
{{- define "gradwire.jobTrainer" -}}
{{- mergeOverwrite (deepCopy .Values.trainer) (deepCopy .Values.jobs.trainer) (dict "nodes" (dict "count" 1)) | toYaml -}}
{{- end -}}

{{/* Options of who may call, of any server. Argument: root. */}}
{{- define "gradwire.accessArgs" -}}
{{- if .Values.auth.secretName }}
- --api-key-file=/etc/gradwire/keys/api-keys
{{- end }}
{{- if .Values.auth.allowNoApiKey }}
- --allow-no-api-key
{{- end }}
{{- if .Values.tls.secretName }}
- --tls-cert-file=/etc/gradwire/tls/tls.crt
- --tls-key-file=/etc/gradwire/tls/tls.key
{{- end }}
{{- if .Values.tls.clientCa }}
- --tls-client-ca-file=/etc/gradwire/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "gradwire.accessMounts" -}}
{{- if .Values.auth.secretName }}
- {name: keys, mountPath: /etc/gradwire/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.secretName }}
- {name: tls, mountPath: /etc/gradwire/tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "gradwire.accessVolumes" -}}
{{- if .Values.auth.secretName }}
- name: keys
  secret:
    secretName: {{ .Values.auth.secretName }}
    defaultMode: 0440
{{- end }}
{{- if .Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ .Values.tls.secretName }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/* Of every pod: nobody special, and only /data and /tmp to write to. */}}
{{- define "gradwire.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "gradwire.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* gRPC's health protocol on a port of its own, which needs no key and no certificate. Argument: [probes, service]. */}}
{{- define "gradwire.probes" -}}
{{- $probes := index . 0 -}}
startupProbe:
  grpc: {port: 7776}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ max 1 (div (int $probes.startupSeconds) 2) }}
livenessProbe:
  grpc: {port: 7776}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 7776, service: {{ index . 1 }}}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}
