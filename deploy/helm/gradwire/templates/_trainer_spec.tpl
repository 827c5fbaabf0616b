{{/*
The StatefulSet's spec of a trainer: what the chart runs itself, and what the control plane makes jobs from.
Arguments: root, trainer (values), labels (of the pod, as text), metrics (bool), page (bool), job (bool: the control plane sets name,
model, context length and certificate).
*/}}
{{- define "gradwire.trainerSpec" -}}
{{- $root := .root -}}
{{- $trainer := .trainer -}}
{{- $several := and (not .job) (gt (int $trainer.nodes.count) 1) -}}
replicas: 1
serviceName: {{ if .job }}job{{ else }}{{ include "gradwire.fullname" $root }}-headless{{ end }}
persistentVolumeClaimRetentionPolicy: {whenDeleted: {{ if .job }}Delete{{ else }}Retain{{ end }}, whenScaled: Retain}
selector:
  matchLabels:
    {{- .labels | nindent 4 }}
template:
  metadata:
    labels:
      {{- .labels | nindent 6 }}
      {{- with $trainer.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $trainer.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    serviceAccountName: {{ include "gradwire.fullname" $root }}-trainer
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: {{ $trainer.terminationGracePeriodSeconds }}
    securityContext:
      {{- include "gradwire.podSecurity" $root | nindent 6 }}
    {{- with $root.Values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with include "gradwire.placement" $trainer | trim }}{{ . | nindent 4 }}{{ end }}
    containers:
      - name: trainer
        image: {{ include "gradwire.image" $root | quote }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        securityContext:
          {{- include "gradwire.containerSecurity" $root | nindent 10 }}
        args:
          - serve
          - --listen=0.0.0.0:7777
          - --health-listen=0.0.0.0:7776
          {{- if not .job }}
          - {{ printf "--base-model=%s" $trainer.baseModel | quote }}
          {{- if $trainer.maxContextLength }}
          - --max-context-length={{ int $trainer.maxContextLength }}
          {{- end }}
          {{- end }}
          {{- if gt (int $trainer.gpu.count) 1 }}
          - --nproc-per-node={{ int $trainer.gpu.count }}
          {{- end }}
          {{- if $several }}
          - --nnodes={{ int $trainer.nodes.count }}
          # In brackets it may be of either family.
          - --rdzv-endpoint=[$(POD_IP)]:29400
          - --join-token-file=/etc/gradwire/join/token
          {{- end }}
          - --drain-timeout-s={{ int $trainer.drainSeconds }}
          - --log-json
          {{- if .metrics }}
          - --metrics-host=0.0.0.0
          - --metrics-port=9090
          {{- end }}
          {{- if .page }}
          - --page=0.0.0.0:8080
          {{- end }}
          {{- with $trainer.storage.url }}
          - {{ printf "--storage-url=%s" . | quote }}
          {{- end }}
          {{- include "gradwire.accessArgs" $root | nindent 10 }}
          {{- with $trainer.extraArgs }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        env:
          {{- include "gradwire.trainerEnv" $trainer | nindent 10 }}
          {{- if $several }}
          - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
          {{- end }}
        {{- if or $trainer.storage.secretName $trainer.envFrom }}
        envFrom:
          {{- with $trainer.storage.secretName }}
          - secretRef: {name: {{ . }}}
          {{- end }}
          {{- with $trainer.envFrom }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- end }}
        ports:
          - {name: grpc, containerPort: 7777}
          - {name: health, containerPort: 7776}
          {{- if $several }}
          - {name: rendezvous, containerPort: 29400}
          {{- end }}
          {{- if .metrics }}
          - {name: metrics, containerPort: 9090}
          {{- end }}
          {{- if .page }}
          - {name: page, containerPort: 8080}
          {{- end }}
        {{- include "gradwire.probes" (list $trainer.probes "gradwire.v1.TrainerService") | nindent 8 }}
        lifecycle:
          # SIGTERM drains; before it, proxies and clients learn that the pod is leaving.
          preStop: {exec: {command: [sleep, "5"]}}
        resources:
          {{- with include "gradwire.trainerResources" $trainer | trim }}{{ . | nindent 10 }}{{ end }}
        volumeMounts:
          - {name: data, mountPath: /data}
          - {name: tmp, mountPath: /tmp}
          {{- with include "gradwire.sharedMemoryMount" $trainer | trim }}{{ . | nindent 10 }}{{ end }}
          {{- if $several }}
          - {name: join-token, mountPath: /etc/gradwire/join, readOnly: true}
          {{- end }}
          {{- include "gradwire.accessMounts" $root | nindent 10 }}
    volumes:
      - {name: tmp, emptyDir: {}}
      {{- with include "gradwire.sharedMemoryVolume" $trainer | trim }}{{ . | nindent 6 }}{{ end }}
      {{- if $several }}
      {{- include "gradwire.joinTokenVolume" $root | nindent 6 }}
      {{- end }}
      {{- with $trainer.persistence.existingClaim }}
      - {name: data, persistentVolumeClaim: {claimName: {{ . }}}}
      {{- end }}
      {{- include "gradwire.accessVolumes" $root | nindent 6 }}
{{- if not $trainer.persistence.existingClaim }}
volumeClaimTemplates:
  - apiVersion: v1
    kind: PersistentVolumeClaim
    metadata:
      name: data
    spec:
      accessModes: [{{ $trainer.persistence.accessMode }}]
      {{- with $trainer.persistence.storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources:
        requests:
          storage: {{ $trainer.persistence.size }}
{{- end }}
{{- end -}}
